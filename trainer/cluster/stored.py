"""Vectors of an embedding store as points: whole shards to a rank, read from disk every pass."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from trainer.cluster.points import unit_rows
from trainer.comm import Comm, agreed
from trainer.errors import ConfigError
from trainer.store import Block, EmbeddingStore
from trainer.store.shard_file import SUFFIX, map_shard, read_part


class StoredPoints:
    """One vector of every sample in this rank's shards of a store.

    Only what is asked for is read, so memory does not grow with the store. Ids stay in memory: 8
    bytes a sample of this rank. DataError where a file is cut or can't be read: on this rank for
    `rows` and on all ranks, which must all call it, for `take`.
    """

    resident = False

    def __init__(
        self, store: EmbeddingStore, comm: Comm, *, which: int = 0, unit_length: bool = False
    ) -> None:
        """`which` of a sample's vectors; `unit_length` scales them as they are read."""
        if not 0 <= which < store.num_vectors:
            raise ConfigError(
                f"{store.folder} has vectors 0 to {store.num_vectors - 1}, no {which}"
            )
        self._store, self._comm = store, comm
        self._which, self._unit_length = which, unit_length
        self.dim = store.dim
        self._kind = torch.float16 if store.identity.dtype == "float16" else torch.float32
        sizes = [entry.rows or 0 for entry in store.header.shards.values()]
        owned = deal(sizes, comm.world_size)[comm.rank]
        names = list(store.header.shards)
        self.shards = [names[shard] for shard in owned]
        """Names of this rank's shards, in the order of its points."""
        self.starts = np.cumsum([0, *(sizes[shard] for shard in owned)])
        """First point of each shard, and the number of points."""
        parts = [np.array(map_shard(self._path(name)).ids) for name in self.shards]
        self._ids = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def ids(self, first: int, last: int) -> Int64[Tensor, " n"]:
        return self._ids[first:last]

    def rows(self, first: int, last: int) -> Float32[Tensor, "n d"]:
        return self.finish(self.stored(first, last))

    def finish(self, rows: Float[Tensor, "n d"]) -> Float32[Tensor, "n d"]:
        return unit_rows(rows.float()) if self._unit_length else rows.float()

    def stored(self, first: int, last: int) -> Float[Tensor, "n d"]:
        """In the store's own float16, where it has that: half the bytes on the way to a device."""
        parts = [torch.empty(0, self.dim, dtype=self._kind)]
        shard = int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < last:
            begin, end = int(self.starts[shard]), int(self.starts[shard + 1])
            stop = min(end, last)
            if stop > first:
                part = read_part(self._path(self.shards[shard]), first - begin, stop - begin)
                parts.append(self._chosen(part, slice(0, stop - first)).to(self._kind))
            first, shard = stop, shard + 1
        return torch.cat(parts)

    def take(self, places: Int64[Tensor, " n"]) -> Float32[Tensor, "n d"]:
        result = torch.empty(len(places), self.dim)
        agreed(self._comm, lambda: self._take(places.cpu().numpy(), result))
        return result

    def _take(self, wanted: NDArray[np.int64], result: Tensor) -> None:
        shards = np.searchsorted(self.starts, wanted, side="right") - 1
        for shard in np.unique(shards).tolist():
            here = shards == shard
            block = map_shard(self._path(self.shards[shard]))
            rows = self._chosen(block, wanted[here] - self.starts[shard])
            result[torch.from_numpy(here)] = self.finish(rows)

    def _chosen(self, block: Block, rows: slice | np.ndarray) -> Float[Tensor, "n d"]:
        if block.scales is None:
            return torch.from_numpy(np.array(block.values[rows, self._which]))
        which = None if self._store.num_vectors == 1 else [self._which]
        return block.read(rows, which)[:, 0]

    def _path(self, name: str) -> Path:
        return self._store.folder / f"{name}{SUFFIX}"


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Items for each rank, ascending, so that the sums of their sizes are close: the largest goes
    to the rank with the least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, rank = heapq.heappop(loads)
        hands[rank].append(item)
        heapq.heappush(loads, (load + sizes[item], rank))
    return [sorted(hand) for hand in hands]
