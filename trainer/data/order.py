"""Which sample comes when: pure functions of the seed and of positions in the run.

A position counts samples over all ranks since the run began. Position p belongs to epoch p // N;
within an epoch shards are permuted, and samples are shuffled within windows of several shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.hashing import key_of, permutation

K = TypeVar("K")
V = TypeVar("V")

_KEPT = 4  # epochs and windows remembered: training and a view of later samples need two each


class Order:
    """The order of all samples in every epoch.

    Memory: one permutation of the shards and one of a window's samples, whatever the total.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, window_shards: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed, self.window_shards = seed, window_shards
        self.epoch_size = int(self.sizes.sum())
        self._first_of_shard = np.cumsum(self.sizes) - self.sizes
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) of a position; every index comes once in every epoch."""
        epoch, rest = divmod(position, self.epoch_size)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, rest, side="right")) - 1
        return epoch, int(self._window(epoch, window)[rest - starts[window]])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted shards, and the first position within the epoch of each window of them."""
        if epoch not in self._epochs:
            shards = permutation(len(self.sizes), key_of(self.seed, "shards", epoch)).numpy()
            ends = np.cumsum(self.sizes[shards])
            window_ends = ends[self.window_shards - 1 :: self.window_shards]
            _remember(self._epochs, epoch, (shards, np.concatenate([[0], window_ends])))
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> NDArray[np.int64]:
        """The sample indices of one window, in the order in which they come."""
        if (epoch, window) not in self._windows:
            first = window * self.window_shards
            shards = self._epoch(epoch)[0][first : first + self.window_shards]
            samples = np.concatenate(
                [np.arange(self.sizes[s]) + self._first_of_shard[s] for s in shards]
            )
            shuffle = permutation(len(samples), key_of(self.seed, "samples", epoch, window))
            _remember(self._windows, (epoch, window), samples[shuffle.numpy()])
        return self._windows[epoch, window]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}, "_windows": {}}


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
