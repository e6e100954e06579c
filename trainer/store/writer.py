"""Building a store shard by shard; every rank has a writer, and no two write the same shard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import DataError
from trainer.store.header import (
    BUILDING,
    HEADER,
    Identity,
    ShardEntry,
    StoreHeader,
    read_header,
    refuse_changed,
    refuse_others,
    write_whole,
)
from trainer.store.lookup import write_lookup
from trainer.store.shard_file import SUFFIX, map_shard, read_shard_header, write_shard

_HALF_INFINITY = 65520.0  # what is below it rounds to a finite float16


class StoreWriter:
    """A store that grows. What is there already is kept, if it is of the same identity."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        self.folder, self.header = folder, header

    @classmethod
    def begin(
        cls, folder: Path, identity: Identity, sources: Mapping[str, tuple[str, int]]
    ) -> StoreWriter:
        """Start a store, or go on with one whose vectors and data are the same.

        `sources` maps the shard names to digests and sample counts of their data. Shards that an
        earlier build finished for other parts of the data stay. DataError where the folder holds
        other vectors, naming what differs.
        """
        before = read_header(folder / BUILDING) or read_header(folder / HEADER)
        if before is None and any(folder.glob(f"*{SUFFIX}")):
            raise DataError(f"{folder} holds vectors without a header; delete it")
        shards = {n: ShardEntry(source=s, samples=count) for n, (s, count) in sources.items()}
        if before is not None:
            refuse_others(folder, before.identity, identity)
            for name in shards.keys() & before.shards.keys():
                refuse_changed(folder, name, before.shards[name].source, shards[name].source)
            old = before.shards.items()
            kept = {n: ShardEntry(source=e.source, samples=e.samples) for n, e in old}
            shards = {**kept, **shards}
        return cls(folder, StoreHeader(identity=identity, shards=shards))

    def announce(self) -> None:
        """Write down what is being built (one rank). A finished store that lacks nothing stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.finished and read_header(self.folder / BUILDING) != self.header:
            write_whole(self.folder / BUILDING, self.header.model_dump_json(indent=1).encode())

    @property
    def finished(self) -> bool:
        header = read_header(self.folder / HEADER)
        return header is not None and header.shards.keys() == self.header.shards.keys()

    def path(self, shard: str) -> Path:
        return self.folder / f"{shard}{SUFFIX}"

    def has(self, shard: str) -> bool:
        """Whether the shard is there, whole. DataError where its file is of another store."""
        if not self.path(shard).exists():
            return False
        try:
            header, _ = read_shard_header(self.path(shard))
        except DataError:  # cut off or damaged: computed again
            return False
        refuse_others(self.path(shard), header.identity, self.header.identity)
        refuse_changed(self.folder, shard, header.source, self.header.shards[shard].source)
        return True

    def write(
        self, shard: str, ids: NDArray[np.int64], vectors: Float32[Tensor, "rows vectors dim"]
    ) -> None:
        """Write one shard. DataError where a vector is not finite as stored; nothing is kept."""
        identity, entry = self.header.identity, self.header.shards[shard]
        if vectors.shape != (len(ids), identity.vectors, identity.dim):
            raise DataError(f"{shard}: {len(ids)} ids, but vectors of {tuple(vectors.shape)}")
        _check_finite(shard, ids, vectors, identity.dtype)
        write_shard(
            self.path(shard),
            identity=identity,
            source=entry.source,
            samples=entry.samples,
            ids=ids,
            vectors=vectors,
        )

    def finish(self) -> StoreHeader:
        """Write the header once every shard is there (one rank)."""
        shards = {
            name: ShardEntry(source=entry.source, samples=entry.samples, rows=self._rows(name))
            for name, entry in self.header.shards.items()
        }
        count = sum(entry.rows or 0 for entry in shards.values())
        header = StoreHeader(identity=self.header.identity, count=count, shards=shards)
        ids = (map_shard(self.path(name), sequential=True).ids for name in shards)
        write_lookup(self.folder, header, ids)
        write_whole(self.folder / HEADER, header.model_dump_json(indent=1).encode())
        for left_over in [self.folder / BUILDING, *self.folder.glob("*.partial")]:
            left_over.unlink(missing_ok=True)
        return header

    def _rows(self, shard: str) -> int:
        if not self.has(shard):
            raise DataError(f"{self.folder} lacks shard {shard}")
        return read_shard_header(self.path(shard))[0].rows


def _check_finite(
    shard: str, ids: NDArray[np.int64], vectors: Float32[Tensor, "rows vectors dim"], dtype: str
) -> None:
    limit = _HALF_INFINITY if dtype == "float16" else float("inf")
    finite = (vectors.abs() < limit).flatten(1).all(1).cpu().numpy()  # false for NaN
    if not finite.all():
        row = int((~finite).nonzero()[0][0])
        raise DataError(
            f"{int((~finite).sum())} of {len(ids)} vectors of shard {shard} are not finite in "
            f"{dtype}; the first is of sample {ids[row]} (row {row})"
        )
