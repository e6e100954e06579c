"""Tasks to arrays: read, decode and tokenize micro-batches, here or in worker processes.

A task names positions of the run, so what comes back does not depend on who works on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from trainer.config import AugmentConfig, DataConfig, ViewsConfig
from trainer.data.captions import choose_caption
from trainer.data.crops import Crops, cover_size, view_purposes
from trainer.data.decode import BadSample, Box, DecodedImages, decode_image
from trainer.data.fields import find_image
from trainer.data.generated import GeneratedCaptions
from trainer.data.ledger import Rejected, describe
from trainer.data.order import Order, Share
from trainer.data.shards import DamagedSample, RawSample, ShardSet
from trainer.data.tokenize import tokenize
from trainer.data.views import View, draw_view
from trainer.data.workers import loader_options, why_no_batch
from trainer.errors import DataError
from trainer.hashing import key_of, uniform_of

MAX_REJECTS = 1000
"""So many rejected samples without a single good one are no accident."""
_CONNECTIONS = 16  # remote samples of one micro-batch that are fetched side by side
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

    images: UInt8[Tensor, "batch 3 size size"]
    tokens: Int64[Tensor, "batch length"] | None
    token_mask: Bool[Tensor, "batch length"] | None
    sample_id: Int64[Tensor, " batch"]
    epochs: Int64[Tensor, " batch"]
    texts: Float32[Tensor, "batch n dim"] | None
    views: UInt8[Tensor, "batch further 3 size size"] | None
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


class Prepared(NamedTuple):
    """One visit of a sample."""

    caption: str
    images: tuple[UInt8[Tensor, "3 size size"], ...]
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
    ) -> None:
        self.resample = resample
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


class IndexedSamples(Dataset[RawBatch | Failure]):
    """Task -> RawBatch through the index: a pure function, bad samples included."""

    def __init__(self, shards: ShardSet, order: Order, prepare: Prepare) -> None:
        self.shards, self.order, self.prepare = shards, order, prepare
        self.key = key_of(prepare.seed, "substitute")

    def __getitem__(self, task: Task) -> RawBatch | Failure:
        rejected: list[Rejected] = []
        try:
            return self._batch(task, rejected)
        except DataError as error:
            return Failure(str(error), tuple(rejected))

    def _batch(self, task: Task, rejected: list[Rejected]) -> RawBatch:
        places = [self.order.at(position) for position in task.positions]
        raws = self._fetched([index for _, index in places])
        rows = [
            self._usable(raw, position, task, rejected)
            for raw, position in zip(raws, task.positions, strict=True)
        ]
        return self.prepare.batch(
            [sample for sample, _ in rows],
            ids=[sample_id for _, sample_id in rows],
            epochs=[visit for visit, _ in places],
            rejected=rejected,
            task=task,
        )

    def _usable(
        self,
        raw: RawSample | DamagedSample,
        position: int,
        task: Task,
        rejected: list[Rejected],
    ) -> tuple[Prepared, int]:
        """The sample or, while it can't be used, another one drawn by its id from its epoch."""
        visit, index = self.order.at(position)
        epoch = position // self.order.epoch_size
        for attempt in range(MAX_REJECTS):
            try:
                sound = _sound(raw)
                return self.prepare.sample(sound, visit, task), sound.sample_id
            except (BadSample, DamagedSample) as error:
                shard, key, sample_id = self.shards.name_of(index)
                rejected.append(Rejected(shard, key, _reason(error, raw), epoch, position))
            draw = uniform_of(sample_id, self.key, visit, attempt)
            index = self.order.substitute(draw, epoch)
            raw = self._read(index)
        raise nothing_usable(rejected)

    def _read(self, index: int) -> RawSample | DamagedSample:
        try:
            return self.shards.read(index)
        except DamagedSample as error:
            return error

    def _fetched(self, indices: Sequence[int]) -> list[RawSample | DamagedSample]:
        if not self.shards.has_remote:
            return [self._read(index) for index in indices]
        with ThreadPoolExecutor(_CONNECTIONS) as threads:
            return list(threads.map(self._read, indices))


def nothing_usable(rejected: Sequence[Rejected]) -> DataError:
    return DataError(
        f"{MAX_REJECTS} samples in a row could not be used: {describe(rejected)}; check "
        "data.captions and the shards' members"
    )


def _sound(raw: RawSample | DamagedSample) -> RawSample:
    if isinstance(raw, DamagedSample):
        raise raw
    return raw


def _reason(error: BadSample | DamagedSample, raw: RawSample | DamagedSample) -> str:
    """The error, and for a sample that lacks something what it has."""
    members = f" (members: {', '.join(sorted(raw.fields))})" if isinstance(raw, RawSample) else ""
    return f"{error}{members}"


class Feed:
    """Batches of plans, prepared ahead by worker processes.

    Asking for what comes next is fast; asking for anything else starts the workers there.
    """

    def __init__(self, samples: IndexedSamples, *, workers: int, pin_memory: bool) -> None:
        self._tasks = _Tasks()
        self._loader: DataLoader[RawBatch | Failure] = DataLoader(
            samples,
            batch_size=None,
            sampler=self._tasks,
            pin_memory=pin_memory,
            **loader_options(workers, preload=__name__),
        )
        self._batches: Iterator[RawBatch | Failure] | None = None
        self._next: tuple[Plan, int] | None = None

    def batch(self, plan: Plan, number: int) -> RawBatch | Failure:
        """Batch `number` of a plan."""
        if self._batches is None or self._next != (plan, number):
            self._tasks.plan, self._tasks.number = plan, number
            self._batches = iter(self._loader)
        self._next = plan, number + 1
        return next_batch(self._batches, workers=self._loader.num_workers)

    def close(self) -> None:
        """End the worker processes."""
        iterator: Any = self._batches
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self._batches = self._loader._iterator = None


def next_batch(batches: Iterator[RawBatch | Failure], *, workers: int) -> RawBatch | Failure:
    """The next one, or the sentence that says why the workers give none."""
    try:
        return next(batches)
    except RuntimeError as error:
        if not workers:
            raise
        return Failure(why_no_batch(error), ())


class _Tasks:
    """The loader's sampler: the tasks of a plan from a number on."""

    plan: Plan
    number: int

    def __iter__(self) -> Iterator[Task]:
        number = self.number
        while (task := self.plan.task(number)) is not None:
            yield task
            number += 1
