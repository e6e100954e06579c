"""The training stream: which micro-batches this rank trains on, and what a phase may look at.

Everything follows from (seed, position): worker count, world size and restarts never change what
is trained on, and every sample comes once per epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import DataConfig, ViewsConfig, micro_batches
from trainer.data.crops import cover_size, view_purposes
from trainer.data.feed import (
    ONE_VIEW,
    Failure,
    Feed,
    IndexedSamples,
    InsteadOfImages,
    Join,
    Plan,
    Prepare,
    RawBatch,
)
from trainer.data.ledger import Ledger
from trainer.data.noise import NoisyShards
from trainer.data.order import Order, Share
from trainer.data.pixels import Pixels
from trainer.data.selection import Selection
from trainer.data.shard_cache import ShardCache
from trainer.data.shards import ShardSet
from trainer.data.views import augment, flipped
from trainer.data.workers import refuse_small_shared_memory
from trainer.errors import ConfigError, DataError
from trainer.pulse import PULSE
from trainer.types import Batch

PADDING_ID = -1


@runtime_checkable
class Source(Protocol):
    """Where raw batches come from: the indexed feed or the webdataset reader."""

    def batch(self, plan: Plan, number: int) -> RawBatch | Failure: ...

    def close(self) -> None: ...


class Stream:
    """Training samples in the run's order; implements `trainer.recipe.Samples`.

    Global position p is sample order(seed, epoch)[p % N] of epoch p // N. A global batch is B
    positions in a row; rank r owns the r-th contiguous slice of B / W of them, in micro-batches.
    No collective is called here.
    """

    def __init__(
        self,
        config: DataConfig,
        comm: Comm,
        *,
        tokenizer: PreTrainedTokenizerFast | None,
        image_size: int,
        text_length: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        workdir: Path | None,
        join: Join | None = None,
        views: ViewsConfig = ONE_VIEW,
        pixels: Pixels | None = None,
        stored: InsteadOfImages | None = None,
        before: Sequence[str] | None = None,
    ) -> None:
        """`before` are the `shard_lines` and `folder_lines` of the run that is gone on with: the
        same shards, wherever they lie, come in the order that they had then; DataError for
        others."""
        self.pixels = pixels or Pixels(image_size)
        self.config, self.comm, self.seed, self.views = config, comm, seed, views
        _, self.num_micro_batches = micro_batches(
            global_batch=global_batch, micro_batch=micro_batch, world_size=comm.world_size
        )
        self.micro_batch = micro_batch
        self.share = Share(global_batch, comm.world_size, comm.rank)
        self.ledger = Ledger(workdir, rank=comm.rank, budget=config.bad_sample_budget)
        prepare = Prepare(
            config,
            tokenizer=tokenizer,
            image_size=image_size,
            text_length=text_length,
            seed=seed,
            join=join,
            views=views,
            resample=self.pixels.resample,
            stored=stored,
        )
        values = 3 * image_size**2 * views.count + 3 * cover_size(image_size, views) ** 2
        refuse_small_shared_memory(
            config.workers,
            batch_bytes=micro_batch * (values + 9 * text_length),
            ranks_here=comm.ranks_here,
        )
        self.epoch_size, self._source, self.shard_lines, self.folder_lines = _open_source(
            config, comm, prepare, before, global_batch
        )
        self.wait_seconds = 0.0
        self.seek(0)

    def seek(self, samples: int) -> None:
        """The next `take()` begins at this global sample count."""
        base = samples % self.share.global_batch
        self._plan = Plan(self.share, base, 0, None, self.micro_batch, "train", all_views=True)
        self._next = self.share.count_before(samples - base) // self.micro_batch

    def take(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, augmented, on its device."""
        return [self.take_one() for _ in range(self.num_micro_batches)]

    def take_one(self) -> Batch:
        """The next micro-batch alone."""
        batch = self._batch(self._plan, self._next, rows=self.micro_batch)
        self._next += 1
        return batch

    def view(
        self, start: int, count: int, *, purpose: str, all_views: bool = False
    ) -> Iterator[Batch]:
        """This rank's share of positions [start, start + count), as training will divide them.

        Augmented by randomness of `purpose`, in one view unless `all_views` are asked for. Every
        rank gets equally many batches of equal size; rows that fill them up repeat an image of
        this rank and have the sample id -1.
        """
        base, end = self._plan.base, start + count
        first = self.share.count_before(start - base)
        last = self.share.count_before(end - base)
        plan = Plan(self.share, base, first, last, self.micro_batch, purpose, all_views)
        spare = plan._replace(last=first + 1)  # a rank without any row of its own still needs one
        padded = self.share.rows_padded(start - base, end - base)
        for number in range(-(-padded // self.micro_batch)):
            owned = min(max(last - first - number * self.micro_batch, 0), self.micro_batch)
            if owned:
                yield self._batch(plan, number, rows=self.micro_batch)
            else:
                batch = self._batch(spare, 0, rows=self.micro_batch)
                yield batch._replace(sample_id=torch.full_like(batch.sample_id, PADDING_ID))

    def close(self) -> None:
        """End the worker processes; nothing is left behind."""
        self._source.close()
        self.ledger.close()

    def _batch(self, plan: Plan, number: int, *, rows: int) -> Batch:
        began = time.perf_counter()
        with PULSE.phase("data"):
            raw = self._source.batch(plan, number)
        self.wait_seconds += time.perf_counter() - began
        if isinstance(raw, Failure):
            self.ledger.put(num_read=len(raw.rejected), rejected=raw.rejected)
            raise DataError(raw.message)
        self.ledger.put(num_read=raw.num_read, rejected=raw.rejected)
        self.ledger.check()
        return self._augmented(raw, plan, rows)

    def _augmented(self, raw: RawBatch, plan: Plan, rows: int) -> Batch:
        missing = rows - len(raw.sample_id)

        def ready(values: Tensor | None) -> Tensor | None:
            return None if values is None else _filled(self._sent(values), missing)

        first, *further = self._views(raw, plan)
        padding = raw.sample_id.new_full((missing,), PADDING_ID)
        return Batch(
            images=ready(first),
            tokens=ready(raw.tokens),
            token_mask=ready(raw.token_mask),
            sample_id=self._sent(torch.cat([raw.sample_id, padding]) if missing else raw.sample_id),
            epoch=ready(raw.epochs),
            texts=ready(raw.texts),
            views=ready(torch.stack(further, dim=1)) if further else None,
            cover=None
            if raw.cover is None
            else ready(self.pixels.normalized(self._sent(raw.cover))),
            boxes=ready(self._mirrored(raw, plan)),
        )

    def _sent(self, values: Tensor) -> Tensor:
        """To the device, behind what it has to do; from pinned memory nobody waits for it."""
        return values.to(self.comm.device, non_blocking=True)

    def _views(self, raw: RawBatch, plan: Plan) -> list[Tensor]:
        """Every view with its own changes of colour; the first one's depend on no other. Stored
        features are sent as they are."""
        pixels = [raw.images, *(() if raw.views is None else raw.views.unbind(dim=1))]
        if raw.images.is_floating_point():
            return [self._sent(rows) for rows in pixels]
        purposes = view_purposes(plan.purpose, self.views, self.config.augment)
        return [
            augment(
                self._sent(view),
                draws,
                config=config,
                mean=self.pixels.unit_mean,
                deviation=self.pixels.unit_deviation,
            )
            for view, draws, (_, config) in zip(
                pixels, raw.draws, purposes[: len(pixels)], strict=True
            )
        ]

    def _mirrored(self, raw: RawBatch, plan: Plan) -> Tensor | None:
        """The views' boxes; where a view was flipped, its left edge is on the right."""
        if raw.boxes is None:
            return None
        boxes = raw.boxes.clone()
        purposes = view_purposes(plan.purpose, self.views, self.config.augment)
        for number, (draws, (_, config)) in enumerate(zip(raw.draws, purposes, strict=True)):
            rows = flipped(draws, config)
            boxes[rows, number] = boxes[rows, number][:, [2, 1, 0, 3]]
        return boxes


def _filled(rows: Tensor, missing: int) -> Tensor:
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


def _open_source(
    config: DataConfig,
    comm: Comm,
    prepare: Prepare,
    before: Sequence[str] | None,
    global_batch: int,
) -> tuple[int, Source, list[str], list[str]]:
    """(samples per epoch, source, what tells the shards from others, and the folders)."""
    pin_memory = comm.device.type == "cuda"
    if config.reader == "webdataset":
        from trainer.data.web_reader import WebFeed  # webdataset is imported where it is wanted

        feed = WebFeed(config, prepare, pin_memory=pin_memory, before=_of_shards(before))
        return feed.epoch_size, feed, feed.lines, _told(feed.lines, prepare, None, before)
    shards = ShardSet.open(config.train, before=_of_shards(before))
    if not len(shards):
        raise DataError(f"the {len(shards.shards)} shards of {config.train!r} hold no sample")
    chosen = None
    if config.select is not None:
        chosen = Selection.open(config.select, shards, seed=prepare.seed)
    told = _told(shards.lines, prepare, chosen, before)
    if config.shard_cache is not None:
        shards.keep_in(ShardCache(config.shard_cache.folder, config.shard_cache.bytes))
    if config.noise.share:
        shards = NoisyShards.over(shards, config.noise, config.images)
    if unknown := sorted((config.weights or {}).keys() - set(shards.sets)):
        raise ConfigError(
            f"data.weights names the set {unknown[0]!r}, which {config.train} does not hold; it "
            f"has {', '.join(sorted(set(shards.sets)))}"
        )
    weights = [(config.weights or {}).get(name, 1.0) for name in shards.sets]
    order = Order(
        shards.sizes,
        seed=prepare.seed,
        window_shards=config.window_shards,
        weights=weights,
        chosen=chosen,
        groups=config.window_groups,
        global_batch=global_batch,
    )
    if not order.epoch_size:
        raise DataError(f"data.weights {config.weights} leave no sample in an epoch; raise them")
    samples = IndexedSamples(shards, order, prepare)
    source = Feed(samples, workers=config.workers, pin_memory=pin_memory)
    return order.epoch_size, source, shards.lines, told


_FOLDERS = ("data.select", "data.captions.generated")
"""Keys whose folders a run goes on with, as it does with its shards; a line of each is kept."""


def _of_shards(before: Sequence[str] | None) -> list[str] | None:
    if before is None:
        return None
    return [line for line in before if line.rsplit(" ", 1)[0] not in _FOLDERS]


def _told(
    lines: list[str], prepare: Prepare, chosen: Selection | None, before: Sequence[str] | None
) -> list[str]:
    """A line for each folder beside the shards; DataError where these are not those of before."""
    if prepare.generated is not None:
        prepare.generated.refuse_other_shards(lines)
    digests = [
        chosen.digest if chosen is not None else None,
        prepare.generated.digest if prepare.generated is not None else None,
    ]
    now = {name: digest for name, digest in zip(_FOLDERS, digests, strict=True) if digest}
    old = now if before is None else dict(line.rsplit(" ", 1) for line in before)
    for name in _FOLDERS:
        if old.get(name) != now.get(name):
            raise DataError(
                f"{name} is not the folder that the run began with; give that one, or choose "
                "another workdir"
            )
    return [f"{name} {digest}" for name, digest in now.items()]
