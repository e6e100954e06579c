"""One file of a store: a header, the vectors from a page boundary on, scales and ids behind.

0        b"EMBEDDED", uint32 length of the JSON, the JSON, zeros up to a multiple of 4096
start    [rows, vectors, dim] float16 or int8, little-endian, row after row
then     [rows, vectors] float32 scales (int8 only), [rows] int64 sample ids
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from trainer.config import Frozen
from trainer.errors import DataError
from trainer.store.header import Identity, write_whole

SUFFIX = ".vectors"
_MAGIC = b"EMBEDDED"
_PAGE = 4096
_PREFIX = len(_MAGIC) + 4
_KINDS: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "int8": np.dtype("i1")}


class ShardHeader(Frozen):
    """What a file says of itself, so that it can't be mistaken wherever it is moved."""

    format: Literal["protoscale-vectors-2"] = "protoscale-vectors-2"
    identity: Identity
    source: str
    """Digest of the index of the data shard."""
    samples: int = Field(ge=0)
    """Of the data shard."""
    rows: int = Field(ge=0)
    checksum: str
    """BLAKE2b, 16 bytes, of everything behind the header."""

    @property
    def payload_bytes(self) -> int:
        return self.rows * self.identity.row_bytes


@dataclass(frozen=True)
class Block:
    """Rows of one file, memory-mapped: nothing is read before it is indexed."""

    name: str
    """Of the shard."""
    ids: NDArray[np.int64]
    """[rows] sample ids."""
    values: NDArray[Any]
    """[rows, vectors, dim] float16, or int8 to be multiplied by `scales`."""
    scales: NDArray[np.float32] | None
    """[rows, vectors]; None for float16."""

    def __len__(self) -> int:
        return len(self.ids)

    def read(
        self,
        rows: slice | NDArray[np.int64],
        which: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> Float32[Tensor, "rows vectors dim"]:
        """Some rows in float32; of each the vectors `which`, in that order, and no others.

        An array [rows, chosen] chooses other vectors of every row.
        """
        columns = np.arange(self.values.shape[1]) if which is None else np.array(which, np.int64)
        numbers = np.arange(len(self))[rows]
        picked = (
            self.values[rows]
            if which is None and isinstance(rows, slice)
            else self.values[numbers[:, None], columns]
        )
        result = picked.astype(np.float32)
        if self.scales is not None:
            result *= self.scales[numbers[:, None], columns][..., None]
        return torch.from_numpy(result)

    def part(self, first: int, last: int) -> Block:
        """Rows first to last - 1, still memory-mapped."""
        scales = None if self.scales is None else self.scales[first:last]
        return Block(self.name, self.ids[first:last], self.values[first:last], scales)


def write_shard(
    path: Path,
    *,
    identity: Identity,
    source: str,
    samples: int,
    ids: NDArray[np.int64],
    vectors: Float32[Tensor, "rows vectors dim"],
) -> None:
    """Write a whole file. The bytes depend on the arguments alone."""
    values, scales = encode(vectors, identity.dtype)
    parts = [values.tobytes(), scales.tobytes(), ids.astype("<i8").tobytes()]
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    header = ShardHeader(
        identity=identity,
        source=source,
        samples=samples,
        rows=len(ids),
        checksum=digest.hexdigest(),
    )
    write_whole(path, _framed(header), *parts)


def encode(
    vectors: Float32[Tensor, "rows vectors dim"], dtype: str
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Values as they are stored, and their scales: the largest of a vector becomes 127."""
    exact = vectors.detach().cpu().numpy()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return exact.astype("<f2"), np.empty(0, "<f4")
    scales = np.abs(exact).max(2, initial=0.0).astype("<f4") / np.float32(127)
    divisors = np.where(scales > 0, scales, 1)[..., None]
    return np.rint(exact / divisors).clip(-127, 127).astype(np.int8), scales


def read_shard_header(path: Path) -> tuple[ShardHeader, int]:
    """The header and where the vectors begin. DataError where the file is not whole."""
    try:
        with path.open("rb") as file:
            start = file.read(_PREFIX)
            if len(start) < _PREFIX or not start.startswith(_MAGIC):
                raise DataError(f"{path} is no file of a store; delete it and compute it again")
            length = struct.unpack("<I", start[len(_MAGIC) :])[0]
            header = ShardHeader.model_validate_json(file.read(length))
            found = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run tools/embed.py again") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DataError(f"{path} has a damaged header ({reason}); delete it") from None
    begin = _aligned(_PREFIX + length)
    expected = begin + header.payload_bytes
    if found != expected:
        raise DataError(f"{path} should hold {expected} bytes, found {found}; compute it again")
    return header, begin


def map_shard(path: Path, *, sequential: bool = False) -> Block:
    """Map a file. Reads ahead where `sequential`, otherwise reads no page that is not touched."""
    header, begin = read_shard_header(path)
    identity, rows = header.identity, header.rows
    shape = (rows, identity.vectors, identity.dim)
    kind = _KINDS[identity.dtype]
    if rows == 0:
        return Block(path.stem, np.empty(0, "<i8"), np.empty(shape, kind), None)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_SEQUENTIAL if sequential else mmap.MADV_RANDOM)
    values = np.frombuffer(mapped, kind, int(np.prod(shape)), begin).reshape(shape)
    place, scales = begin + values.nbytes, None
    if identity.dtype == "int8":
        scales = np.frombuffer(mapped, "<f4", rows * identity.vectors, place).reshape(shape[:2])
        place += scales.nbytes
    return Block(path.stem, np.frombuffer(mapped, "<i8", rows, place), values, scales)


def read_part(path: Path, first: int, last: int) -> Block:
    """Rows first to last - 1, in memory.

    DataError where the file has become shorter or can't be read: touching a map of such a file
    kills the process.
    """
    header, begin = read_shard_header(path)
    vectors, dim, kind = header.identity.vectors, header.identity.dim, header.identity.dtype
    count, row = last - first, vectors * dim * _KINDS[kind].itemsize
    scales, end = None, begin + header.rows * row
    with path.open("rb") as file:
        values = read_exactly(file.fileno(), path, begin + first * row, count * row)
        if kind == "int8":
            start = end + first * vectors * 4
            found = read_exactly(file.fileno(), path, start, count * vectors * 4)
            scales = np.frombuffer(found, "<f4").reshape(count, vectors)
            end += header.rows * vectors * 4
        ids = read_exactly(file.fileno(), path, end + first * 8, count * 8)
    shape = (count, vectors, dim)
    return Block(
        path.stem,
        np.frombuffer(ids, "<i8"),
        np.frombuffer(values, _KINDS[kind]).reshape(shape),
        scales,
    )


def read_exactly(descriptor: int, path: Path, start: int, count: int) -> bytearray:
    """So many bytes from a place in a file."""
    result = bytearray(count)
    rest = memoryview(result)
    try:
        while len(rest):
            got = os.preadv(descriptor, [rest], start)
            if got == 0:
                raise DataError(
                    f"{path} ends at byte {start}, {len(rest)} bytes too early: it was cut while"
                    " it was read; compute it again"
                )
            rest, start = rest[got:], start + got
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    return result


def check_shard(path: Path) -> None:
    """Read the whole file. DataError where it is not what was written."""
    header, begin = read_shard_header(path)
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        file.seek(begin)
        while data := file.read(1 << 20):
            digest.update(data)
    if digest.hexdigest() != header.checksum:
        raise DataError(
            f"{path} is damaged: checksum {header.checksum} expected, found "
            f"{digest.hexdigest()}; delete it and run tools/embed.py again"
        )


def _framed(header: ShardHeader) -> bytes:
    text = header.model_dump_json().encode()
    frame = _MAGIC + struct.pack("<I", len(text)) + text
    return frame.ljust(_aligned(len(frame)), b"\0")


def _aligned(count: int) -> int:
    return -(-count // _PAGE) * _PAGE
