"""Reading a finished store: by sample id, or block after block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import DataError
from trainer.store.header import (
    BUILDING,
    HEADER,
    StoreHeader,
    read_header,
    refuse_changed,
    refuse_others,
)
from trainer.store.lookup import Lookup, open_lookup, sorted_lookup
from trainer.store.shard_file import (
    SUFFIX,
    Block,
    check_shard,
    map_shard,
    read_shard_header,
)

_THREADS = 16  # files are looked at side by side: a network answers each after a while
_MAPPED_FILES = 128  # each holds a descriptor; a process may have a thousand


class EmbeddingStore:
    """The vectors of a finished store. Nothing is read before it is asked for.

    By id, in any order:  `store.rows(ids)`, `store.vectors(ids, which=[0, 4, 7])`
    All, once through:    `for block in store.blocks(rank, world_size): block.ids, block.values`
    """

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        self.folder, self.header = folder, header
        self.identity = header.identity
        self._names = list(header.shards)
        counts = [entry.rows or 0 for entry in header.shards.values()]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._mapped: OrderedDict[int, Block] = OrderedDict()

    @classmethod
    def open(cls, path: Path | str) -> EmbeddingStore:
        """DataError where the store is unfinished, a file is missing, cut or of other vectors."""
        folder = Path(path)
        header = read_header(folder / HEADER)
        if header is None:
            raise DataError(_absence(folder))
        with ThreadPoolExecutor(_THREADS) as threads:
            for _ in threads.map(lambda name: _look_at(folder, header, name), header.shards):
                pass
        return cls(folder, header)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        return self.identity.dim

    @property
    def num_vectors(self) -> int:
        """Vectors per sample."""
        return self.identity.vectors

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """The sample ids in the order of the rows: files in the header's order, then rows."""
        found = np.empty(len(self), np.int64)
        for file, (start, end) in enumerate(pairwise(self._starts)):
            found[start:end] = self._block(file).ids
        return found

    def rows(self, ids: Int64[Tensor, " n"]) -> Float32[Tensor, "n dim"]:
        """The vector of every id; for stores with one vector per sample."""
        if self.num_vectors != 1:
            raise DataError(f"{self.folder} has {self.num_vectors} vectors per sample, not one")
        return self.vectors(ids)[:, 0]

    def has(self, sample_id: int) -> bool:
        ids = self._lookup.ids
        place = int(np.searchsorted(ids, sample_id))
        return place < len(ids) and int(ids[place]) == sample_id

    def vectors(
        self,
        ids: Int64[Tensor, " n"],
        which: Sequence[int] | Int64[Tensor, "n chosen"] | None = None,
    ) -> Float32[Tensor, "n chosen dim"]:
        """The vectors `which` (all where None) of every id, in the orders given.

        A tensor chooses for every id on its own. Only the pages that hold them are read.
        DataError where an id is not in the store.
        """
        rows = self._find(ids.cpu().numpy())
        chosen = self._columns(which)
        result = torch.empty(len(rows), chosen.shape[1], self.dim)
        files = np.searchsorted(self._starts, rows, side="right") - 1
        for file in np.unique(files).tolist():
            wanted = files == file
            inside = rows[wanted] - self._starts[file]
            own = chosen if len(chosen) == 1 else chosen[wanted]
            result[torch.from_numpy(wanted)] = self._block(file).read(inside, own)
        return result

    def blocks(self, rank: int = 0, world_size: int = 1) -> Iterator[Block]:
        """Every row once, in the order of `ids`: this rank's contiguous share, file by file.

        Rank r of W has the rows ceil(n / W) * r onwards, so the shares differ by few rows however
        the shards are cut; all ranks together see every row once. A `Block` has the shard's
        `name`, `ids` [rows], `values` [rows, vectors, dim] as a memory map (float16; int8 with
        `scales`), and `read(slice(a, b), which)` for float32 tensors of a part. A file is mapped
        when its block is reached and unmapped when the block is dropped; the kernel reads ahead.
        """
        share = Comm(rank=rank, world_size=world_size, device=torch.device("cpu"))
        first, last = share.row_range(len(self))
        for name, start, end in zip(self._names, self._starts, self._starts[1:], strict=False):
            low, high = max(first, int(start)), min(last, int(end))
            if low < high:
                block = map_shard(self.folder / f"{name}{SUFFIX}", sequential=True)
                yield block.part(low - int(start), high - int(start))

    def check(self) -> None:
        """Read everything. DataError where a file's bytes are not those that were written."""
        for name in self._names:
            check_shard(self.folder / f"{name}{SUFFIX}")

    def _columns(self, which: Sequence[int] | Tensor | None) -> NDArray[np.int64]:
        """[1 or n, chosen]"""
        given = range(self.num_vectors) if which is None else which
        chosen = np.atleast_2d(np.asarray(given, dtype=np.int64))
        if (wrong := chosen[(chosen < 0) | (chosen >= self.num_vectors)]).size:
            raise DataError(f"{self.folder} has vectors 0 to {self.num_vectors - 1}, no {wrong[0]}")
        return chosen

    def _block(self, file: int) -> Block:
        if file not in self._mapped:
            if len(self._mapped) >= _MAPPED_FILES:
                self._mapped.popitem(last=False)
            self._mapped[file] = map_shard(self.folder / f"{self._names[file]}{SUFFIX}")
        self._mapped.move_to_end(file)
        return self._mapped[file]

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        ordered, order = self._lookup
        if not len(ordered):
            places = np.zeros(len(ids), np.int64)
            unknown = np.ones(len(ids), bool)
        else:
            places = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
            unknown = ordered[places] != ids
        if count := int(unknown.sum()):
            raise DataError(
                f"{count} of {len(ids)} sample ids have no vector in {self.folder} "
                f"({len(self)} vectors); the first is {ids[unknown][0]}"
            )
        return order[places] if len(ordered) else places

    @cached_property
    def _lookup(self) -> Lookup:
        return open_lookup(self.folder, self.header) or sorted_lookup(self.ids)


def _look_at(folder: Path, header: StoreHeader, name: str) -> None:
    """DataError where one file is not what the store's header says of it."""
    file, entry = folder / f"{name}{SUFFIX}", header.shards[name]
    found, _ = read_shard_header(file)
    refuse_others(file, found.identity, header.identity)
    refuse_changed(folder, name, found.source, entry.source)
    if found.rows != entry.rows:
        raise DataError(f"{file} has {found.rows} rows, the header says {entry.rows}")


def _absence(folder: Path) -> str:
    building = read_header(folder / BUILDING)
    if building is None:
        return f"no embedding store at {folder}; make one with tools/embed.py"
    done = sum((folder / f"{name}{SUFFIX}").exists() for name in building.shards)
    return (
        f"the embedding store {folder} is unfinished ({done} of {len(building.shards)} shards); "
        "run tools/embed.py again"
    )
