"""A micro-batch before its images are on the device, and how a sample becomes a row of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.config import AugmentConfig, DataConfig, ViewsConfig
from trainer.data.captions import choose_caption
from trainer.data.crops import Crops, cover_size, view_purposes
from trainer.data.decode import Box, DecodedImages, decode_image
from trainer.data.fields import find_image
from trainer.data.generated import GeneratedCaptions
from trainer.data.ledger import Rejected
from trainer.data.order import Share
from trainer.data.shards import RawSample
from trainer.data.tokenize import tokenize
from trainer.data.views import View, draw_view

ONE_VIEW = ViewsConfig()


class Task(NamedTuple):
    """One micro-batch of one rank."""

    positions: tuple[int, ...]
    purpose: str
    all_views: bool
    """Whether every view that the recipe wants is made, or the first one alone."""


class Plan(NamedTuple):
    """A sequence of tasks: this rank's positions from `first` to `last`, `rows` at a time."""

    share: Share
    base: int
    """The position at which the first global batch begins."""
    first: int
    last: int | None
    rows: int
    purpose: str
    all_views: bool = False

    def task(self, number: int) -> Task | None:
        """Task `number`; None behind the end."""
        begin = self.first + number * self.rows
        end = begin + self.rows if self.last is None else min(begin + self.rows, self.last)
        positions = tuple(self.base + self.share.position(row) for row in range(begin, end))
        return Task(positions, self.purpose, self.all_views) if positions else None


class RawBatch(NamedTuple):
    """A micro-batch before augmentation, and what went wrong on the way to it."""

    images: UInt8[Tensor, "batch 3 size size"] | Float32[Tensor, "batch dim"]
    tokens: Int64[Tensor, "batch length"] | None
    token_mask: Bool[Tensor, "batch length"] | None
    sample_id: Int64[Tensor, " batch"]
    epochs: Int64[Tensor, " batch"]
    texts: Float32[Tensor, "batch n dim"] | None
    views: UInt8[Tensor, "batch further 3 size size"] | Float32[Tensor, "batch further dim"] | None
    cover: UInt8[Tensor, "batch 3 cover_size cover_size"] | None
    boxes: Float32[Tensor, "batch count 4"] | None
    draws: Float64[Tensor, "count batch 11"]
    """What each view's changes of colour are drawn by (`draw_view`)."""
    num_read: int
    rejected: tuple[Rejected, ...]


class Failure(NamedTuple):
    """An error that has to cross from a worker to its parent without losing its one sentence."""

    message: str
    rejected: tuple[Rejected, ...]


Join = Callable[[Int64[Tensor, " batch"], Int64[Tensor, " batch"]], Float32[Tensor, "batch n dim"]]
"""Vectors that belong to samples of these ids in these epochs, read where images are decoded."""


class InsteadOfImages(Protocol):
    """Stored features that are read in their place; BadSample where a sample has none."""

    dim: int

    def whole(self, sample_id: int) -> Float32[Tensor, " dim"]: ...

    def views(
        self, sample_id: int, epoch: int, count: int, *, purpose: str
    ) -> Float32[Tensor, "count dim"]: ...


class Prepared(NamedTuple):
    """One visit of a sample."""

    caption: str
    images: tuple[UInt8[Tensor, "3 size size"] | Float32[Tensor, " dim"], ...]
    """Every view; at least one."""
    cover: UInt8[Tensor, "3 cover_size cover_size"] | None
    boxes: tuple[Box, ...]
    """Where each view lies in the cover; empty where there is none."""


class Prepare:
    """Decodes, crops and chooses captions as one run's configuration says."""

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: PreTrainedTokenizerFast | None,
        image_size: int,
        text_length: int,
        seed: int,
        join: Join | None = None,
        views: ViewsConfig = ONE_VIEW,
        resample: int = Image.Resampling.BICUBIC,
        stored: InsteadOfImages | None = None,
    ) -> None:
        self.resample, self.stored = resample, stored
        self.config, self.tokenizer, self.seed, self.join = config, tokenizer, seed, join
        self.image_size, self.text_length, self.views = image_size, text_length, views
        self.kept = DecodedImages(config.cache_mib << 20) if config.cache_mib else None
        self.generated = None
        if config.captions.generated is not None and tokenizer is not None:
            self.generated = GeneratedCaptions(config.captions.generated)

    def sample(self, raw: RawSample, epoch: int, task: Task | Plan) -> Prepared:
        """Caption and views; BadSample says why not. Without a tokenizer no caption is read."""
        caption = ""
        if self.tokenizer is not None:
            fields = raw.fields
            if self.generated is not None:
                fields = self.generated.added(fields, raw.sample_id)
            caption = choose_caption(
                fields,
                sample_id=raw.sample_id,
                epoch=epoch,
                seed=self.seed,
                config=self.config.captions,
            )
        views = self.views if task.all_views else ONE_VIEW
        if self.stored is not None:
            found = self.stored.views(raw.sample_id, epoch, views.count, purpose=task.purpose)
            return Prepared(caption, tuple(found), cover=None, boxes=())
        crops = Crops(
            raw.sample_id,
            [View(self.seed, epoch, purpose, config) for purpose, config in self.purposes(task)],
            geometry=views.geometry,
        )
        several = views.count > 1 or views.geometry != "independent"
        look = self._looker(find_image(raw.fields, self.config.images), several=several)
        images = tuple(look(self.image_size, crop=partial(crops.of, v)) for v in crops.views)
        if views.geometry == "independent":
            return Prepared(caption, images, cover=None, boxes=())
        cover = look(cover_size(self.image_size, views), crop=crops.covering)
        return Prepared(caption, images, cover, tuple(crops.boxes()))

    def _looker(self, data: bytes, *, several: bool) -> Callable[..., Tensor]:
        """`look(size, crop=...)` at one image, which is decoded once for several looks."""
        kept = self.kept or (DecodedImages(4 * self.config.max_pixels) if several else None)

        def look(size: int, *, crop: Callable[[int, int], Box]) -> Tensor:
            return decode_image(
                data,
                size=size,
                background=self.config.background,
                max_pixels=self.config.max_pixels,
                crop=crop,
                kept=kept,
                resample=self.resample,
            )

        return look

    def batch(
        self,
        samples: Sequence[Prepared],
        *,
        ids: Sequence[int],
        epochs: Sequence[int],
        rejected: Sequence[Rejected],
        task: Task | Plan,
    ) -> RawBatch:
        tokens = mask = None
        if self.tokenizer is not None:
            captions = [sample.caption for sample in samples]
            tokens, mask = tokenize(self.tokenizer, captions, length=self.text_length)
        sample_id = torch.tensor(ids, dtype=torch.int64)
        epoch = torch.tensor(epochs, dtype=torch.int64)
        first, *further = (
            torch.stack(view) for view in zip(*(s.images for s in samples), strict=True)
        )
        purposes = self.purposes(task)
        covers = [sample.cover for sample in samples if sample.cover is not None]
        return RawBatch(
            images=first,
            tokens=tokens,
            token_mask=mask,
            sample_id=sample_id,
            epochs=epoch,
            texts=None if self.join is None else self.join(sample_id, epoch),
            views=torch.stack(further, dim=1) if further else None,
            cover=torch.stack(covers) if covers else None,
            boxes=torch.tensor([sample.boxes for sample in samples]) if covers else None,
            draws=torch.stack(
                [
                    draw_view(sample_id, epoch, seed=self.seed, purpose=purpose)
                    for purpose, _ in purposes
                ]
            ),
            num_read=len(samples) + len(rejected),
            rejected=tuple(rejected),
        )

    def purposes(self, task: Task | Plan) -> list[tuple[str, AugmentConfig]]:
        """Of each view that the task makes."""
        views = self.views if task.all_views else ONE_VIEW
        return view_purposes(task.purpose, views, self.config.augment)
