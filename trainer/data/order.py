"""Which sample comes when: pure functions of the seed and of positions in the run.

A position counts samples over all ranks since the run began. Position p belongs to epoch p // N;
within an epoch shards are permuted, and samples are shuffled within windows of several shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.hashing import key_of, permutation

K = TypeVar("K")
V = TypeVar("V")

_KEPT = 4  # epochs and windows remembered: training and a view of later samples need two each


class Chosen(Protocol):
    """Some of the samples of every shard, in every epoch as many."""

    @property
    def kept(self) -> Sequence[int]:
        """How many of each shard."""
        ...

    def rows(self, shard: int, epoch: int) -> NDArray[np.int64]:
        """Which of its samples, ascending."""
        ...


class Order:
    """The order of all samples in every epoch.

    With `weights`, one a shard, an epoch holds each sample of a shard so many times. Of a weight
    with a fraction, that share of the shard's samples (rounded) comes once more, others in the next
    epoch: a fixed order of them is gone through in turns. Every time is a visit of its own.
    Of `chosen` samples alone, where they are given; then each of those counts as said.

    Memory: one permutation of the shards and one of a window's samples (of each group), whatever
    the total.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int,
        window_shards: int,
        weights: Sequence[float] | None = None,
        chosen: Chosen | None = None,
        groups: int = 1,
        global_batch: int = 1,
    ) -> None:
        """`groups` windows are gone through side by side: the g-th part of every global batch comes
        from the g-th of them, as long as that one has samples. A rank, whose samples of a batch
        follow each other, then reads from one window where the ranks are at least as many.
        DataError where the batch can't be divided so.
        """
        if global_batch % groups:
            raise DataError(
                f"data.window_groups is {groups}, which does not divide the global batch of "
                f"{global_batch}; take a divisor, as the number of hosts"
            )
        self.groups, self.global_batch = groups, global_batch
        whole = np.asarray(sizes, dtype=np.int64)
        self.chosen, self.kept = chosen, whole
        if chosen is not None:
            self.kept = np.asarray(chosen.kept, dtype=np.int64)
        pieces = _pieces(self.kept, [1.0] * len(whole) if weights is None else weights)
        self.shard, self.copy, self.sizes = (
            np.array(c, dtype=np.int64) for c in zip(*pieces, strict=True)
        )
        self.whole = whole
        self.seed, self.window_shards = seed, window_shards
        self.epoch_size = int(self.sizes.sum())
        self.copies = int(self.copy.max(initial=0)) + 1
        self._first_of_shard = np.cumsum(whole) - whole
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}

    def at(self, position: int) -> tuple[int, int]:
        """(visit, sample index) of a position; without weights every index comes once in every
        epoch, and the visit is the epoch."""
        epoch, rest = divmod(position, self.epoch_size)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, rest, side="right")) - 1
        copy, index = divmod(int(self._window(epoch, window)[rest - starts[window]]), self._total)
        return epoch * self.copies + copy, index

    def substitute(self, draw: float, epoch: int) -> int:
        """The index of the sample that a number in [0, 1) draws of all that may come."""
        number = int(draw * int(self.kept.sum()))
        if self.chosen is None:
            return number
        ends = np.cumsum(self.kept)
        shard = int(np.searchsorted(ends, number, side="right"))
        row = self.chosen.rows(shard, epoch)[number - (ends[shard] - self.kept[shard])]
        return int(self._first_of_shard[shard] + row)

    @property
    def _total(self) -> int:
        return int(self.whole.sum())

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards, and the first position within the epoch of each window of them."""
        if epoch not in self._epochs:
            shards = permutation(len(self.sizes), key_of(self.seed, "shards", epoch)).numpy()
            ends = np.cumsum(self.sizes[shards])
            together = self.window_shards * self.groups
            window_ends = ends[together - 1 :: together]
            _remember(self._epochs, epoch, (shards, np.concatenate([[0], window_ends])))
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The sample indices of one window of each group, in the order in which they come."""
        if (epoch, window) not in self._windows:
            first = window * self.groups
            each = [self._shuffled(epoch, number) for number in range(first, first + self.groups)]
            position = epoch * self.epoch_size + int(self._epoch(epoch)[1][window])
            _remember(self._windows, (epoch, window), self._side_by_side(each, position))
        return self._windows[epoch, window]

    def _shuffled(self, epoch: int, number: int) -> NDArray[np.int64]:
        first = number * self.window_shards
        shards = self._epoch(epoch)[0][first : first + self.window_shards]
        samples = [np.empty(0, np.int64), *(self._samples(piece, epoch) for piece in shards)]
        found: NDArray[np.int64] = np.concatenate(samples)
        shuffle = permutation(len(found), key_of(self.seed, "samples", epoch, number))
        shuffled: NDArray[np.int64] = found[shuffle.numpy()]
        return shuffled

    def _side_by_side(self, each: list[NDArray[np.int64]], position: int) -> NDArray[np.int64]:
        """The samples of every group in the places of its part of the batches from `position` on.

        What a group has more than places fills, in the groups' order, the places of those that have
        less.
        """
        count = sum(map(len, each))
        place = (position + np.arange(count)) % self.global_batch
        group = place * self.groups // self.global_batch
        result: NDArray[np.int64] = np.empty(count, np.int64)
        left_places, left_samples = [], []
        for number, samples in enumerate(each):
            places = np.flatnonzero(group == number)
            both = min(len(places), len(samples))
            result[places[:both]] = samples[:both]
            left_places.append(places[both:])
            left_samples.append(samples[both:])
        result[np.concatenate(left_places)] = np.concatenate(left_samples)
        return result

    def _samples(self, piece: int, epoch: int) -> NDArray[np.int64]:
        """The samples of a piece in an epoch, `copy` times the number of all samples further on."""
        shard, count = self.shard[piece], self.sizes[piece]
        rows: NDArray[np.int64] = np.arange(count)
        if count < self.kept[shard]:
            turns = permutation(int(self.kept[shard]), key_of(self.seed, "turns", int(shard)))
            rows = turns.numpy()[(epoch * count + rows) % self.kept[shard]]
        if self.chosen is not None:
            rows = self.chosen.rows(int(shard), epoch)[rows]
        first = int(self._first_of_shard[shard] + self.copy[piece] * self._total)
        return rows + first

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}, "_windows": {}}


def _pieces(whole: NDArray[np.int64], weights: Sequence[float]) -> list[tuple[int, int, int]]:
    """(shard, which copy of it, samples of that) of all that an epoch holds."""
    pieces = []
    for shard, (size, weight) in enumerate(zip(whole.tolist(), weights, strict=True)):
        times, share = divmod(weight, 1.0)
        pieces += [(shard, copy, size) for copy in range(int(times))]
        if share:
            pieces.append((shard, int(times), round(share * size)))
    return pieces


def _remember(cache: dict[K, V], key: K, value: V) -> None:
    if len(cache) >= _KEPT:
        del cache[next(iter(cache))]
    cache[key] = value


class Share(NamedTuple):
    """One rank's part of the positions: the r-th of W equal slices of every global batch."""

    global_batch: int
    world_size: int
    rank: int

    @property
    def per_rank(self) -> int:
        return self.global_batch // self.world_size

    def count_before(self, position: int) -> int:
        """How many positions below `position` are this rank's."""
        batch, rest = divmod(position, self.global_batch)
        inside = min(max(rest - self.rank * self.per_rank, 0), self.per_rank)
        return batch * self.per_rank + inside

    def position(self, number: int) -> int:
        """This rank's position number `number`, counted from the beginning of the run."""
        batch, rest = divmod(number, self.per_rank)
        return batch * self.global_batch + self.rank * self.per_rank + rest

    def rows_padded(self, start: int, end: int) -> int:
        """The largest number of positions in [start, end) that any rank has."""
        shares = (self._replace(rank=rank) for rank in range(self.world_size))
        return max(share.count_before(end) - share.count_before(start) for share in shares)
