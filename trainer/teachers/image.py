"""A frozen vision model as teacher: images in, features out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from trainer.config import IMAGE_FIELDS
from trainer.data.fields import find_image
from trainer.data.pixels import Pixels
from trainer.data.shards import RawSample
from trainer.models.tower import pooled_image, pooled_states
from trainer.store import Identity
from trainer.teachers.batches import Budget
from trainer.teachers.frozen import FrozenStates, Precision, Shard

_MAX_PIXELS = 25_000_000
_CHUNK = 256


class ImageReader(NamedTuple):
    """Finds and decodes a sample's image."""

    pixels: Pixels
    images: tuple[str, ...]

    def read(self, sample: RawSample) -> UInt8[Tensor, "3 size size"]:
        """BadSample where the sample has no image that can be decoded."""
        return self.pixels.decode(find_image(sample.fields, self.images), max_pixels=_MAX_PIXELS)


class ImageTeacher:
    """The features that `model` gives of a sample's image; one vector per sample."""

    chunk: int | None = _CHUNK

    def __init__(
        self,
        model: nn.Module,
        pixels: Pixels,
        *,
        name: str,
        model_hash: str,
        pooling: str,
        dim: int,
        layer: int = -1,
        unit_norm: bool = True,
        precision: Precision = "float32",
        batch_images: int = 16,
        settings: str = "not recorded",
        note: str = "",
        images: Sequence[str] = IMAGE_FIELDS,
    ) -> None:
        self.images = tuple(images)
        self.reader = ImageReader(pixels, self.images)
        self.model = model.eval().requires_grad_(False)
        self.pixels, self.name, self.model_hash = pixels, name, model_hash
        self.pooling, self.layer, self.dim = pooling, layer, dim
        self.unit_norm, self.precision = unit_norm, precision
        self.settings, self.note = settings, note
        shared = isinstance(model, VisionFeatures) and model.states.sharded is not None
        self.budget = Budget(batch_images, shared=shared)
        self.device = next(model.parameters()).device

    @property
    def identity(self) -> Identity:
        return Identity(
            teacher=self.name,
            model=self.model_hash,
            tokenizer=self.pixels.text + self._of_members,
            reads="image",
            pooling=self.pooling + (", unit norm" if self.unit_norm else ""),
            mask="none",
            layer=self.layer,
            compute=self.precision,
            dim=self.dim,
            settings=self.settings,
        )

    @property
    def _of_members(self) -> str:
        return "" if self.images == IMAGE_FIELDS else f", of {','.join(self.images)}"

    def read(self, sample: RawSample) -> UInt8[Tensor, "3 size size"]:
        return self.reader.read(sample)

    @torch.inference_mode()
    def encode(self, items: Sequence[Tensor]) -> Float32[Tensor, "images 1 dim"]:
        def compute(batch: list[int]) -> Tensor:
            images = torch.stack([items[index] for index in batch]).to(self.device)
            vectors: Tensor = self.model(self.pixels.normalized(images)).float()
            if self.unit_norm:
                vectors = nn.functional.normalize(vectors, dim=-1)
            return vectors[:, None]

        return self.budget.run([1] * len(items), compute)

    @torch.inference_mode()
    def stand_by(self) -> None:
        if isinstance(self.model, VisionFeatures):
            self.model.stand_by(self.pixels.size, self.device)


class VisionFeatures(nn.Module):
    """A transformers vision model and how its patches become one vector.

    `cls` is the first state, `mean` the mean of all, `projected` what the model pools by itself:
    of a pair the embedding that it gives beside texts.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        how: Literal["cls", "mean", "projected"],
        layer: int = -1,
        projection: nn.Module | None = None,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        self.how = how
        self.states = FrozenStates(model, layer=layer, shard=shard)
        self.projection = projection

    def forward(self, pixels: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch dim"]:
        kind = next(self.parameters()).dtype
        if self.how == "projected":
            pooled = pooled_image(self.states.run(pixel_values=pixels.to(kind)), "own")
            if self.projection is not None:
                pooled = self.projection(pooled)
            return pooled
        states = self.states(pixel_values=pixels.to(kind)).float()
        return pooled_states(states, self.how)

    def stand_by(self, size: int, device: torch.device) -> None:
        """Run along with the ranks that still have images."""
        kind = next(self.parameters()).dtype
        self.states.stand_by(pixel_values=torch.zeros(1, 3, size, size, dtype=kind, device=device))
