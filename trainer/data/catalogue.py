"""One file for a whole list of shards: what opening each of them finds out, and their indexes.

Opening the shards of a list costs every rank a look at each of them. A catalogue is written once,
after those looks, and maps into memory: a header, the shards' indexes byte for byte, the ids of all
samples as one column, and a table of the shards. Little-endian throughout.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.addresses import without_secrets
from trainer.data.remote import is_remote
from trainer.errors import DataError
from trainer.settings.section import split_set

SUFFIX = ".catalogue"
_MAGIC = b"SHARDCAT"
_HEADER = struct.Struct("<8sQQQ16s16s")  # ids and table: where they begin, digests
_CRC = struct.Struct("<I")
_READ_BYTES = 1 << 24


class Entry(NamedTuple):
    """What opening one shard finds out."""

    path: str
    set_name: str
    index_bytes: bytes
    """The bytes of its index."""
    digest: str
    """Of the index's columns, in hexadecimal digits."""
    ids: NDArray[np.int64]
    """The ids of its samples, as members of their set."""


class _Table(NamedTuple):
    """A row a shard."""

    shards: list[str]
    sets: list[str]
    digests: list[str]
    sizes: list[int]
    """Samples."""
    starts: list[int]
    """Where its index begins in the file; one more row says where the last one ends."""


class Catalogue(NamedTuple):
    """An opened catalogue. Only the table is in memory."""

    path: str
    table: _Table
    ids_at: int
    ids_digest: bytes

    def index_bytes(self, row: int) -> bytes:
        """The index of a shard, as it was when the catalogue was made."""
        start, end = self.table.starts[row : row + 2]
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def ids(self) -> NDArray[np.int64]:
        """The ids of all samples in the order of the shards, mapped: 8 bytes a sample on disk.

        DataError where they are not those that were written. They are read once for that.
        """
        count = sum(self.table.sizes)
        if not count:
            return np.empty(0, np.int64)
        digest = blake2b(digest_size=16)
        with open(self.path, "rb") as file:
            file.seek(self.ids_at)
            for start in range(0, 8 * count, _READ_BYTES):
                digest.update(file.read(min(_READ_BYTES, 8 * count - start)))
        if digest.digest() != self.ids_digest:
            raise _damaged(self.path, "sample ids")
        # copy on write: torch wants a writable array, and the file is never changed
        return np.memmap(self.path, "<i8", mode="c", offset=self.ids_at, shape=(count,))


def is_catalogue(spec: str) -> bool:
    """Whether a spec names one catalogue, and not shards."""
    return spec.strip().endswith(SUFFIX) and "::" not in spec and not split_set(spec.strip())[0]


def write_catalogue(path: str, entries: Iterable[Entry]) -> int:
    """Write a catalogue, whole or not at all, and return the number of its samples.

    Paths of local shards are kept relative to the catalogue's folder: both may move together.
    """
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb+") as file:
            count = _write(file, entries, Path(path).parent)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return count


def _write(file: BinaryIO, entries: Iterable[Entry], folder: Path) -> int:
    file.write(bytes(_HEADER.size + _CRC.size))
    table = _Table([], [], [], [], [file.tell()])
    with TemporaryFile(dir=folder) as ids:  # they come behind the last index
        for entry in entries:
            if without_secrets(entry.path) != entry.path:
                raise DataError(
                    f"{entry.path} has a password or a signature, which a catalogue would pass on; "
                    "list the shards themselves, or let the store know you by its own settings"
                )
            file.write(entry.index_bytes)
            ids.write(np.ascontiguousarray(entry.ids, dtype="<i8").data)
            table.shards.append(_relative(entry.path, folder))
            table.sets.append(entry.set_name)
            table.digests.append(entry.digest)
            table.sizes.append(len(entry.ids))
            table.starts.append(file.tell())
        file.write(bytes(-file.tell() % 8))
        ids_at = file.tell()
        ids.seek(0)
        ids_digest = _copied(ids, file)
    table_at, text = file.tell(), json.dumps(table._asdict()).encode()
    file.write(text)
    digest = blake2b(text, digest_size=16).digest()
    header = _HEADER.pack(_MAGIC, ids_at, table_at, len(text), ids_digest, digest)
    file.seek(0)
    file.write(header + _CRC.pack(zlib.crc32(header)))
    return sum(table.sizes)


def _copied(source: IO[bytes], target: BinaryIO) -> bytes:
    """Copy the rest of a file; the digest of what was copied."""
    digest = blake2b(digest_size=16)
    while data := source.read(_READ_BYTES):
        target.write(data)
        digest.update(data)
    return digest.digest()


def open_catalogue(path: str) -> Catalogue:
    """Read the table of a catalogue. DataError where it is none, damaged or cut short."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER.size + _CRC.size)
            if not head.startswith(_MAGIC) or len(head) < _HEADER.size + _CRC.size:
                raise DataError(f"{path} is no catalogue of shards; {_mend(path)}")
            header = head[: _HEADER.size]
            if _CRC.unpack(head[_HEADER.size :])[0] != zlib.crc32(header):
                raise _damaged(path, "header")
            _, ids_at, table_at, table_bytes, ids_digest, digest = _HEADER.unpack(header)
            if not len(head) <= ids_at <= table_at <= table_at + table_bytes <= _size(file):
                raise _damaged(path, "table of shards")
            file.seek(table_at)
            text = file.read(table_bytes)
    except FileNotFoundError:
        raise DataError(f"no catalogue {path}; {_mend(path)}") from None
    if blake2b(text, digest_size=16).digest() != digest:
        raise _damaged(path, "table of shards")
    table = _table_of(text)
    if table is None or table.starts[-1] > ids_at or 8 * sum(table.sizes) > table_at - ids_at:
        raise DataError(f"{path} contradicts itself; {_mend(path)}")
    shards = [_absolute(shard, Path(path).parent) for shard in table.shards]
    return Catalogue(path, table._replace(shards=shards), ids_at, ids_digest)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _table_of(text: bytes) -> _Table | None:
    """None where the table is none, though its sum is right, as nobody writes it here."""
    try:
        table = _Table(**json.loads(text))
        texts = [*table.shards, *table.sets, *table.digests]
        counts = [*table.sizes, *table.starts]
    except (ValueError, TypeError, RecursionError):
        return None
    good = all(isinstance(each, str) and "\0" not in each for each in texts)
    good = good and all(type(each) is int and 0 <= each < 2**62 for each in counts)
    even = {len(table.shards), len(table.sets), len(table.digests), len(table.sizes)}
    if not good or len(even) != 1 or len(table.starts) != len(table.shards) + 1:
        return None
    return table if table.starts == sorted(table.starts) else None


def _relative(path: str, folder: Path) -> str:
    return path if is_remote(path) else os.path.relpath(path, folder)


def _absolute(path: str, folder: Path) -> str:
    return path if is_remote(path) else os.path.normpath(folder / path)


def _mend(path: str) -> str:
    return f"write it: python tools/index.py SHARDS --missing --catalogue {path}"


def _damaged(path: str, what: str) -> DataError:
    return DataError(f"{path} is damaged: its {what} do not match their checksum; {_mend(path)}")
