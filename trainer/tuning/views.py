"""A vision teacher that gives each image's features once as it is and several times augmented.

Stored, they replace the encoder: a visit in training draws two of the augmented ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from torch import Tensor

from trainer.config import AugmentConfig
from trainer.data.decode import decode_image
from trainer.data.fields import find_image
from trainer.data.shards import RawSample
from trainer.data.views import View, augment, draw_view, random_crop
from trainer.store import Identity
from trainer.teachers.image import ImageTeacher

MAX_PIXELS = 25_000_000
WEAK = AugmentConfig(
    crop_scale=(0.8, 1.0), jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0
)
"""Random crops of four fifths at least, and flips: what the published code trains on."""

Item = tuple[int, UInt8[Tensor, "views 3 size size"]]


class ImageViews:
    """Vector 0 of a sample is that of the whole image, 1 to `count` are of random views."""

    def __init__(
        self, teacher: ImageTeacher, *, count: int, seed: int, config: AugmentConfig = WEAK
    ) -> None:
        self.teacher, self.config = teacher, config
        self.views = [View(seed, 0, f"tuning view {n}", config) for n in range(1, count + 1)]
        self.chunk = teacher.chunk
        self.stand_by = teacher.stand_by

    @property
    def identity(self) -> Identity:
        own = self.teacher.identity
        if not self.views:
            return own
        drawn = (
            f"{own.tokenizer}, views of seed {self.views[0].seed} {self.config.model_dump_json()}"
        )
        return own.model_copy(update={"tokenizer": drawn, "vectors": 1 + len(self.views)})

    def read(self, sample: RawSample) -> Item:
        """BadSample where the sample has no image that can be decoded."""
        data = find_image(sample.fields)
        pixels = self.teacher.pixels
        looks = [
            decode_image(
                data,
                size=pixels.size,
                background=pixels.background,
                max_pixels=MAX_PIXELS,
                crop=partial(random_crop, sample_id=sample.sample_id, view=view),
                resample=pixels.resample,
            )
            for view in self.views
        ]
        return sample.sample_id, torch.stack([self.teacher.read(sample), *looks])

    def encode(self, items: Sequence[Item]) -> Float32[Tensor, "items vectors dim"]:
        whole = self.teacher.encode([images[0] for _, images in items])
        views = [self._view(items, place) for place in range(len(self.views))]
        return torch.cat([whole, *views], dim=1)

    @torch.inference_mode()
    def _view(self, items: Sequence[Item], place: int) -> Float32[Tensor, "items 1 dim"]:
        teacher, view = self.teacher, self.views[place]

        def compute(batch: list[int]) -> Tensor:
            ids = torch.tensor([items[index][0] for index in batch])
            pixels = augment(
                torch.stack([items[index][1][1 + place] for index in batch]),
                draw_view(ids, torch.zeros_like(ids), seed=view.seed, purpose=view.purpose),
                config=view.config,
                mean=teacher.pixels.unit_mean,
                deviation=teacher.pixels.unit_deviation,
            )
            vectors: Tensor = teacher.model(pixels.to(teacher.device)).float()
            return (F.normalize(vectors, dim=-1) if teacher.unit_norm else vectors)[:, None]

        return teacher.budget.run([1] * len(items), compute)
