"""Indexed random access to the samples of many WebDataset shards or tables, local or remote.

Opening compares every shard's size with its index; reading compares every header and every
member with its CRC-32. A damaged shard is named, with what was expected and what was found.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.index import (
    HEADER_BYTES,
    IndexSummary,
    ShardIndex,
    ids_in_set,
    index_path,
    read_index,
    read_summary,
    sample_id,
)
from trainer.data.remote import expand_sets, file_size, is_remote, read_file, read_range
from trainer.data.sets import named_shard, names_by_folder, refuse_other_shards
from trainer.data.tables import BadRow, is_table, read_row
from trainer.errors import DataError

__all__ = ["DamagedSample", "RawSample", "ShardSet", "sample_id"]

T = TypeVar("T")

_OPEN_SHARDS = 64  # files and parsed indexes kept; a window of shards must fit
_NAMED = 8  # missing shards that a sentence names
_OPENING_THREADS = 16  # remote sizes and indexes are fetched side by side


class DamagedSample(DataError):
    """The bytes of one sample are not those that were indexed; the rest of the shard may be."""


class RawSample(NamedTuple):
    """One sample as it is stored."""

    sample_id: int
    shard: str
    key: str
    fields: dict[str, bytes]
    """Member contents by suffix, without the dot: `png`, `txt`, `json`."""


class ShardSet:
    """All samples of a shard list, by number: 0 to len - 1 in the order of the list."""

    def __init__(
        self,
        shards: Sequence[str],
        sizes: Sequence[int],
        remote: dict[str, bytes],
        *,
        sets: Sequence[str],
        digests: Sequence[str],
    ) -> None:
        self.shards, self.sizes = tuple(shards), tuple(sizes)
        self.sets, self.digests = tuple(sets), tuple(digests)
        self._remote_indexes = remote
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._forget()

    @classmethod
    def open(cls, spec: str, *, before: Sequence[str] | None = None) -> ShardSet:
        """Open every shard that a spec names (braces, globs, `::` lists; paths and URLs; sets).

        DataError where a shard or its index is missing, a shard's size is not the indexed one,
        or two samples have one id. Where samples of two folders would, and no set is named, each
        folder is a set that is called after what tells it from the others. Local indexes stay on
        disk; remote ones are fetched once. `before` are the `lines` of a set that this one has to
        be, in whose order the shards then come; DataError where they are others.
        """
        listed = expand_sets(spec)
        shards = [path for _, path in listed]
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            inspected = list(threads.map(_inspect, shards))
        found = _all_there(shards, inspected)
        remote = {
            shard: data for shard, (_, data) in zip(shards, found, strict=True) if is_remote(shard)
        }
        opened = cls(
            shards,
            [summary.num_samples for summary, _ in found],
            remote,
            sets=[name for name, _ in listed],
            digests=[summary.digest.hex() for summary, _ in found],
        )._distinct()
        return opened if before is None else opened._in_order_of(before)

    @property
    def names(self) -> list[str]:
        """The shards' names, with the set's before it where there is one: `cc3m=00000`."""
        return [named_shard(name, path) for name, path in zip(self.sets, self.shards, strict=True)]

    @property
    def lines(self) -> list[str]:
        """Name and digest of each shard's index: what the samples are, wherever they lie."""
        return [f"{name} {digest}" for name, digest in zip(self.names, self.digests, strict=True)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """The sample ids of all samples, in order; read from the indexes on first use."""
        columns = [self._index(row).ids for row in range(len(self.shards))]
        return np.concatenate([np.empty(0, np.int64), *columns])

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, sample within it) of sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def name_of(self, index: int) -> tuple[str, str, int]:
        """(shard, key, sample id) of sample `index`, from the index alone."""
        shard, row = self.locate(index)
        columns = self._index(shard)
        return self.shards[shard], columns.keys[row], int(columns.ids[row])

    def read(self, index: int) -> RawSample:
        """Read one sample: all its members in one request, each checked by its CRC-32.

        DamagedSample where a header or member differs from the index, and where a table's row or
        its picture can't be read; DataError where the shard has another size than the indexed one.
        """
        shard, row = self.locate(index)
        columns, name = self._index(shard), self.shards[shard]
        members = range(int(columns.first[row]), int(columns.first[row + 1]))
        start = int(columns.offset[members[0]]) - int(columns.header_bytes[members[0]])
        end = int(columns.offset[members[-1]]) + int(columns.size[members[-1]])
        data = self._bytes(shard, start, end)
        fields: dict[str, bytes] = {}
        for member in members:
            suffix = columns.suffixes[columns.suffix[member]]
            place = f"{name}: {columns.keys[row]}"
            place += "" if is_table(name) else f".{suffix}"
            fields[suffix] = _checked_member(data, start, columns, member, place)
        if is_table(name):
            fields = _row_fields(fields, name, place)
        return RawSample(int(columns.ids[row]), name, columns.keys[row], fields)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for handle in self._files.values():
            os.close(handle)
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        """What a worker process needs: no open file and no parsed index."""
        return {
            "shards": self.shards,
            "sizes": self.sizes,
            "remote": self._remote_indexes,
            "sets": self.sets,
            "digests": self.digests,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _forget(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def _index(self, shard: int) -> ShardIndex:
        return _kept(self._indexes, shard, self._load_index)

    def _load_index(self, shard: int) -> ShardIndex:
        if len(self._indexes) >= _OPEN_SHARDS:
            self._indexes.popitem(last=False)
        name = self.shards[shard]
        index = read_index(name, self._remote_indexes.get(name))
        if len(index.keys) != self.sizes[shard]:
            raise DataError(
                f"{index_path(name)} changed: {self.sizes[shard]} samples when it was opened, "
                f"now {len(index.keys)}; start again"
            )
        return index._replace(ids=ids_in_set(index.ids, self.sets[shard]))

    def _bytes(self, shard: int, start: int, end: int) -> bytes:
        name = self.shards[shard]
        if is_remote(name):
            return read_range(name, start, end)
        try:
            handle = _kept(self._files, shard, self._open_file)
            data = os.pread(handle, end - start, start)
        except OSError as error:
            raise DataError(f"can't read {name}: {error.strerror}") from error
        if len(data) < end - start:
            found = os.fstat(handle).st_size
            raise _wrong_size(name, self._index(shard).shard_bytes, found)
        return data

    def _open_file(self, shard: int) -> int:
        if len(self._files) >= _OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        handle = os.open(self.shards[shard], os.O_RDONLY)
        found, expected = os.fstat(handle).st_size, self._index(shard).shard_bytes
        if found != expected:
            os.close(handle)
            raise _wrong_size(self.shards[shard], expected, found, self.sizes[shard])
        return handle

    def _distinct(self) -> ShardSet:
        """This set; with its folders as sets where samples would have one id otherwise."""
        double, first = self._shared_ids()
        if not double:
            return self
        folders = None if any(self.sets) else names_by_folder(self.shards)
        named = self._with(sets=folders) if folders else self
        if folders is None or named._shared_ids()[0]:
            raise DataError(
                f"{double} samples have the same shard name and key ({' and '.join(first)}), hence "
                "the same id; name the sets, as {one: 'one/*.tar', two: 'two/*.tar'} in YAML or "
                "'one=one/*.tar::two=two/*.tar', or rename one of the files"
            )
        return named

    def _shared_ids(self) -> tuple[int, list[str]]:
        """How many ids come twice, and two shards that have them.

        Ids can only meet where two shards have one name in different folders.
        """
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            rows.setdefault(name, []).append(row)
        for namesakes in rows.values():
            if len(namesakes) > 1:
                ids = np.concatenate([self._index(row).ids for row in namesakes])
                if double := len(ids) - len(np.unique(ids)):
                    return double, [self.shards[row] for row in namesakes[:2]]
        return 0, []

    def _in_order_of(self, lines: Sequence[str]) -> ShardSet:
        mine = self.lines
        if mine == list(lines):
            return self
        refuse_other_shards(lines, mine)
        row = {line: number for number, line in enumerate(mine)}
        return self._with(rows=[row[line] for line in lines])

    def _with(
        self, *, sets: Sequence[str] | None = None, rows: Sequence[int] | None = None
    ) -> ShardSet:
        """The same shards under other sets, or in another order."""
        rows = range(len(self.shards)) if rows is None else rows
        return ShardSet(
            [self.shards[row] for row in rows],
            [self.sizes[row] for row in rows],
            self._remote_indexes,
            sets=[(self.sets if sets is None else sets)[row] for row in rows],
            digests=[self.digests[row] for row in rows],
        )


def _row_fields(stored: dict[str, bytes], table: str, place: str) -> dict[str, bytes]:
    """What a table's row holds. Its one member is the row, and is named by the layout."""
    ((layout, row),) = stored.items()
    try:
        return read_row(row, layout, table=table)
    except BadRow as error:
        raise DamagedSample(f"{place}: {error}") from None


def _kept(cache: OrderedDict[int, T], key: int, load: Callable[[int], T]) -> T:
    if key not in cache:
        cache[key] = load(key)
    cache.move_to_end(key)
    return cache[key]


def _all_there(shards: Sequence[str], inspected: Sequence[T | None]) -> list[T]:
    """What was found of each shard; DataError that names those that are missing."""
    there = [found for found in inspected if found is not None]
    missing = [name for name, found in zip(shards, inspected, strict=True) if found is None]
    if not missing:
        return there
    if not there:
        more = f", nor any other of the {len(shards)} that are listed" if len(shards) > 1 else ""
        raise DataError(f"no shard {missing[0]}{more}")
    rest = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    raise DataError(
        f"no shard {', '.join(missing[:_NAMED])}{rest}: {len(missing)} of {len(shards)} are "
        "missing; get them, or list those that are there, as a pattern with * or "
        "{000..003}.tar::{005..009}.tar does"
    )


def _inspect(shard: str) -> tuple[IndexSummary, bytes] | None:
    """The index's header after comparing the shard's size with it, and a remote index's bytes.

    None where there is no shard.
    """
    path = index_path(shard)
    if not is_remote(shard) and os.path.isdir(shard):
        raise DataError(f"{shard} is a folder; name its shards, as {os.path.join(shard, '*.tar')}")
    try:
        found = file_size(shard)
    except FileNotFoundError:
        return None
    try:
        data = read_file(path) if is_remote(path) else _first_bytes(path)
    except FileNotFoundError:
        raise DataError(f"no index {path}; build it: python tools/index.py '{shard}'") from None
    summary = read_summary(data[:HEADER_BYTES], path=path)
    if found != summary.shard_bytes:
        raise _wrong_size(shard, summary.shard_bytes, found, summary.num_samples)
    return summary, data if is_remote(path) else b""


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES)


def _wrong_size(shard: str, expected: int, found: int, samples: int | None = None) -> DataError:
    counted = "" if samples is None else f" ({samples} samples)"
    verdict = "truncated" if found < expected else "changed"
    return DataError(
        f"{shard} is {verdict}: its index expects {expected} bytes{counted}, found {found}; get "
        f"the shard again, or if it is right: python tools/index.py '{shard}'"
    )


def _checked_member(data: bytes, start: int, columns: ShardIndex, member: int, place: str) -> bytes:
    """The member's bytes out of `data`, which begins at byte `start` of the shard."""
    offset = int(columns.offset[member]) - start
    header = data[offset - int(columns.header_bytes[member]) : offset]
    content = data[offset : offset + int(columns.size[member])]
    for what, found, expected in (
        ("tar header", zlib.crc32(header), int(columns.header_crc[member])),
        ("content", zlib.crc32(content), int(columns.crc[member])),
    ):
        if found != expected:
            raise DamagedSample(
                f"{place}: {what} at byte {start + offset} is damaged, crc32 expected "
                f"{expected:08x}, found {found:08x}"
            )
    return content
