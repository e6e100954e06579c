"""The embedding store: vectors of samples on disk, joined to training data by sample id.

A folder with one block per shard of the data and one header:

    header.json     what the vectors are (model, tokenizer, text, pooling ...), rows per shard
    <shard>.f16     [rows, vectors, dim] float16, little-endian, row after row: memory-mapped
    <shard>.ids     [rows] int64 sample ids; written last, so it is there only beside a whole block
    building.json   the header while shards are still missing

The shard is the unit of work: it is written to temporary files and renamed, so a build that was
killed goes on with the next shard, and ranks build different shards without talking.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from trainer.config import Frozen, PositiveInt
from trainer.errors import DataError

HEADER, BUILDING = "header.json", "building.json"
_ITEM_BYTES = {"float16": 2}

ShardName = Annotated[str, Field(pattern=r"^[^/\\.\x00][^/\\\x00]*$", max_length=200)]
"""A plain file name: a header can't point out of its folder."""


class Identity(Frozen):
    """What the vectors are. Two stores whose identities differ are never mixed."""

    teacher: str
    """A name for people."""
    model: str
    """SHA-256 of the weights."""
    tokenizer: str
    """SHA-256 of the tokenizer."""
    text: str
    """Which text of a sample was read, as the caption configuration in JSON."""
    prompt: str = "{}"
    """The text stood where the braces are."""
    pooling: str
    layer: int = -1
    """Block whose output was pooled; -1 is the last."""
    vectors: PositiveInt = 1
    """Vectors per sample."""
    dim: PositiveInt
    dtype: Literal["float16"] = "float16"

    @property
    def row_bytes(self) -> int:
        return self.vectors * self.dim * _ITEM_BYTES[self.dtype]


class ShardEntry(Frozen):
    """One shard of the store."""

    source: str
    """Digest of the index of the data shard that was read."""
    rows: int | None = Field(default=None, ge=0)
    """None until all shards are there."""


class StoreHeader(Frozen):
    """header.json and building.json."""

    format: Literal["protoscale-embeddings-1"] = "protoscale-embeddings-1"
    identity: Identity
    count: int | None = Field(default=None, ge=0)
    """Rows of all shards."""
    shards: dict[ShardName, ShardEntry]


class EmbeddingStore:
    """The vectors of a finished store, by sample id. Nothing is read before it is asked for."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        self.folder, self.header = folder, header
        self.identity = header.identity
        self._counts = [entry.rows or 0 for entry in header.shards.values()]
        self._starts = np.concatenate([[0], np.cumsum(self._counts, dtype=np.int64)])
        self._blocks = [
            self._block(name, rows) for name, rows in zip(header.shards, self._counts, strict=True)
        ]

    @classmethod
    def open(cls, path: Path | str) -> EmbeddingStore:
        """DataError where the store is unfinished, or a file is missing or has another size."""
        folder = Path(path)
        header = read_header(folder / HEADER)
        if header is None:
            raise DataError(_absence(folder))
        for name, entry in header.shards.items():
            _check_size(folder / f"{name}.ids", 8 * (entry.rows or 0))
            _check_size(folder / f"{name}.f16", header.identity.row_bytes * (entry.rows or 0))
        return cls(folder, header)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        return self.identity.dim

    @property
    def vectors(self) -> int:
        return self.identity.vectors

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """The sample ids in the order of the rows."""
        parts = [np.fromfile(self.folder / f"{name}.ids", "<i8") for name in self.header.shards]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def rows(self, ids: Int64[Tensor, " n"]) -> Float32[Tensor, "n dim"]:
        """The vector of every id; for stores with one vector per sample."""
        if self.vectors != 1:
            raise DataError(f"{self.folder} has {self.vectors} vectors per sample, not one")
        return self.blocks(ids)[:, 0]

    def blocks(self, ids: Int64[Tensor, " n"]) -> Float32[Tensor, "n vectors dim"]:
        """All vectors of every id. DataError where an id is not in the store."""
        rows = self._find(ids.cpu().numpy())
        result = np.empty((len(rows), self.vectors, self.dim), np.float32)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shards):
            wanted = shards == shard
            result[wanted] = self._blocks[shard][rows[wanted] - self._starts[shard]]
        return torch.from_numpy(result)

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        order, ordered = self._lookup
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
        return order[places]

    @cached_property
    def _lookup(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.argsort(self.ids, kind="stable")
        return order, self.ids[order]

    def _block(self, name: str, rows: int) -> NDArray[np.float16]:
        shape = (rows, self.vectors, self.dim)
        if rows == 0:  # an empty file can't be mapped
            return np.empty(shape, "<f2")
        return np.memmap(self.folder / f"{name}.f16", "<f2", "r", shape=shape)


class StoreWriter:
    """Builds a store shard by shard; every rank has one, and no two write the same shard."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        self.folder, self.header = folder, header

    @classmethod
    def begin(cls, folder: Path, identity: Identity, sources: dict[str, str]) -> StoreWriter:
        """Start a store, or go on with one whose vectors and data are the same.

        `sources` maps the shard names to digests of their data. Shards that an earlier build
        finished for other parts of the data stay. DataError where the folder holds other vectors.
        """
        before = read_header(folder / BUILDING) or read_header(folder / HEADER)
        if before is None and any(folder.glob("*.ids")):
            raise DataError(f"{folder} holds vectors without a header; delete it")
        shards = {name: ShardEntry(source=source) for name, source in sources.items()}
        if before is not None:
            _refuse_others(folder, before, identity, shards)
            shards = {
                **{n: ShardEntry(source=e.source) for n, e in before.shards.items()},
                **shards,
            }
        return cls(folder, StoreHeader(identity=identity, shards=shards))

    def announce(self) -> None:
        """Write down what is being built (one rank). A finished store that lacks nothing stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.finished and read_header(self.folder / BUILDING) != self.header:
            _write(self.folder / BUILDING, self.header.model_dump_json(indent=1).encode())

    @property
    def finished(self) -> bool:
        header = read_header(self.folder / HEADER)
        return header is not None and header.shards.keys() == self.header.shards.keys()

    def has(self, shard: str) -> bool:
        """Whether the shard is there, whole."""
        try:
            self._rows(shard)
        except DataError:
            return False
        return True

    def write(
        self,
        shard: str,
        ids: NDArray[np.int64],
        vectors: Float32[Tensor, "rows vectors dim"],
    ) -> None:
        """Write one shard. DataError where a vector is not finite in float16; nothing is kept."""
        if vectors.shape != (len(ids), self.header.identity.vectors, self.header.identity.dim):
            raise DataError(f"{shard}: {len(ids)} ids, but vectors of {tuple(vectors.shape)}")
        block = vectors.cpu().to(torch.float16)
        finite = block.isfinite().flatten(1).all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise DataError(
                f"{int((~finite).sum())} of {len(ids)} vectors of shard {shard} are not finite in "
                f"float16; the first is of sample {ids[row]} (row {row})"
            )
        _write(self.folder / f"{shard}.f16", block.numpy().astype("<f2").tobytes())
        _write(self.folder / f"{shard}.ids", ids.astype("<i8").tobytes())

    def finish(self) -> StoreHeader:
        """Write the header once every shard is there (one rank)."""
        shards = {
            name: ShardEntry(source=entry.source, rows=self._rows(name))
            for name, entry in self.header.shards.items()
        }
        count = sum(entry.rows or 0 for entry in shards.values())
        header = StoreHeader(identity=self.header.identity, count=count, shards=shards)
        _write(self.folder / HEADER, header.model_dump_json(indent=1).encode())
        for left_over in [self.folder / BUILDING, *self.folder.glob("*.partial")]:
            left_over.unlink(missing_ok=True)
        return header

    def _rows(self, shard: str) -> int:
        ids = self.folder / f"{shard}.ids"
        if not ids.exists():
            raise DataError(f"{self.folder} lacks shard {shard}")
        rows = ids.stat().st_size // 8
        _check_size(ids, 8 * rows)
        _check_size(self.folder / f"{shard}.f16", rows * self.header.identity.row_bytes)
        return rows


def read_header(path: Path) -> StoreHeader | None:
    """None where there is no such file; DataError where it is not a store's header."""
    try:
        return StoreHeader.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{path} is no header of a store: {place} {problem['msg']}") from None


def _refuse_others(
    folder: Path, before: StoreHeader, identity: Identity, shards: dict[str, ShardEntry]
) -> None:
    old, new = before.identity.model_dump(), identity.model_dump()
    for key in new:
        if old[key] != new[key]:
            raise DataError(
                f"{folder} holds vectors with {key} {old[key]!r}, not {new[key]!r}; "
                "give another folder, or delete it"
            )
    for name, entry in shards.items():
        if name in before.shards and before.shards[name].source != entry.source:
            raise DataError(
                f"shard {name} has changed since its vectors in {folder} were computed; "
                "give another folder, or delete it"
            )


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found is None:
        raise DataError(f"{path} is missing; it should hold {expected} bytes")
    if found != expected:
        raise DataError(f"{path} should hold {expected} bytes, found {found}; compute it again")


def _absence(folder: Path) -> str:
    building = read_header(folder / BUILDING)
    if building is None:
        return f"no embedding store at {folder}; make one with tools/embed.py"
    done = sum((folder / f"{name}.ids").exists() for name in building.shards)
    return (
        f"the embedding store {folder} is unfinished ({done} of {len(building.shards)} shards); "
        "run tools/embed.py again"
    )


def _write(path: Path, data: bytes) -> None:
    """All of the file or nothing of it, whenever the process dies."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
