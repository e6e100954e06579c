"""Where each sample id lies in a store: sorted once, when the store is finished, and then mapped.

Every process that looks vectors up would sort all ids for itself otherwise: minutes and gigabytes
where there are hundreds of millions. One file: a header, the ids in ascending order, and beside
each its row in the store's order. Little-endian.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.store.header import StoreHeader

FILE = "lookup.bin"
_MAGIC = b"IDLOOKUP"
_HEADER = struct.Struct("<8sQ16s")  # rows, and a digest of the shards whose rows they are
_PART_ROWS = 1 << 20
_MOST_PARTS = 256


class Lookup(NamedTuple):
    """Ascending ids, and the row of each."""

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]


def sorted_lookup(ids: NDArray[np.int64]) -> Lookup:
    """In memory. Of equal ids the first row comes first."""
    rows = np.argsort(ids, kind="stable")
    return Lookup(ids[rows], rows)


def write_lookup(folder: Path, header: StoreHeader, columns: Iterable[NDArray[np.int64]]) -> None:
    """Sort the ids of a finished store, its files' columns in order, into `lookup.bin`.

    Ids are hashes: parts of their range are sorted one after the other, so that memory holds about
    two million ids whatever their number.
    """
    count = header.count or 0
    bits = max(1, min(_MOST_PARTS, -(-count // _PART_ROWS)).bit_length())
    partial = folder / f"{FILE}.partial"
    with ExitStack() as opened:
        parts = [opened.enter_context(TemporaryFile(dir=folder)) for _ in range(1 << bits)]
        _divide(columns, parts, bits)
        rows_file = opened.enter_context(TemporaryFile(dir=folder))
        file = opened.enter_context(partial.open("wb"))
        file.write(_HEADER.pack(_MAGIC, count, _digest(header)))
        for part in parts:
            part.seek(0)
            pairs = np.frombuffer(part.read(), dtype="<i8").reshape(-1, 2)
            found = sorted_lookup(pairs[:, 0])
            file.write(np.ascontiguousarray(found.ids).data)
            rows_file.write(np.ascontiguousarray(pairs[found.rows, 1]).data)
        rows_file.seek(0)
        shutil.copyfileobj(rows_file, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / FILE)


def _divide(columns: Iterable[NDArray[np.int64]], parts: Sequence[IO[bytes]], bits: int) -> None:
    """Write (id, row) pairs to the part of the id's leading bits, in ascending order of ids.

    Ids are 63 bits, so half of the parts stay empty; a negative id would come before them.
    """
    first = 0
    for ids in columns:
        pairs = np.stack([ids, np.arange(first, first + len(ids))], axis=1).astype("<i8")
        which = (ids.view("<u8") ^ np.uint64(1 << 63)) >> np.uint64(64 - bits)
        for part in np.unique(which).tolist():
            parts[part].write(np.ascontiguousarray(pairs[which == part]).data)
        first += len(ids)


def open_lookup(folder: Path, header: StoreHeader) -> Lookup | None:
    """Map the file; None where there is none of these rows, as in a store of an earlier version."""
    path, count = folder / FILE, header.count or 0
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    expected = _HEADER.pack(_MAGIC, count, _digest(header))
    if head != expected or size != _HEADER.size + 16 * count or not count:
        return None
    columns = np.memmap(path, "<i8", mode="r", offset=_HEADER.size, shape=(2, count))
    return Lookup(columns[0], columns[1])


def _digest(header: StoreHeader) -> bytes:
    shards = [(name, entry.source, entry.rows) for name, entry in header.shards.items()]
    return blake2b(json.dumps(shards).encode(), digest_size=16).digest()
