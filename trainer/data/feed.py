"""Tasks to arrays: read, decode and tokenize micro-batches, here or in worker processes.

A task names positions of the run, so what comes back does not depend on who works on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader, Dataset

from trainer.data.decode import BadSample
from trainer.data.ledger import Rejected, describe
from trainer.data.order import Order
from trainer.data.prepare import (
    ONE_VIEW,
    Failure,
    InsteadOfImages,
    Join,
    Plan,
    Prepare,
    Prepared,
    RawBatch,
    Task,
)
from trainer.data.shards import DamagedSample, RawSample, ShardSet
from trainer.data.workers import loader_options, why_no_batch
from trainer.errors import DataError
from trainer.hashing import key_of, uniform_of

__all__ = [
    "MAX_REJECTS",
    "ONE_VIEW",
    "Failure",
    "Feed",
    "IndexedSamples",
    "InsteadOfImages",
    "Join",
    "Plan",
    "Prepare",
    "RawBatch",
    "next_batch",
    "nothing_usable",
]

MAX_REJECTS = 1000
"""So many rejected samples without a single good one are no accident."""
_CONNECTIONS = 16  # remote samples of one micro-batch that are fetched side by side


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
