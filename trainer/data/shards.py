"""Indexed random access to the samples of many WebDataset shards or tables, local or remote.

Opening compares every shard's size with its index; reading compares every header and every
member with its CRC-32. A damaged shard is named, with what was expected and what was found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from trainer.data.catalogue import Catalogue, is_catalogue, open_catalogue
from trainer.data.columnar import ColumnarFiles, is_columnar
from trainer.data.index import (
    ShardIndex,
    ids_in_set,
    index_path,
    read_index,
    sample_id,
)
from trainer.data.members import DamagedSample, RawSample, read_members
from trainer.data.open_files import OPEN_SHARDS, OpenFiles
from trainer.data.opening import inspect_shards
from trainer.data.remote import expand_sets, is_remote, read_range
from trainer.data.sets import named_shard, names_by_folder, refuse_other_shards
from trainer.data.shard_cache import ShardCache
from trainer.data.tables import BadRow, is_table
from trainer.errors import DataError

__all__ = ["DamagedSample", "RawSample", "ShardSet", "sample_id"]


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
        catalogue: Catalogue | None = None,
        rows: Sequence[int] | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        """`rows` says which shards of the catalogue these are; all, in its order, where None."""
        self._catalogue, self._rows = catalogue, rows
        self._cache = cache
        self.shards, self.sizes = tuple(shards), tuple(sizes)
        self._any_remote = any(map(is_remote, self.shards))
        self.sets, self.digests = tuple(sets), tuple(digests)
        self._remote_indexes = remote
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._forget()

    @classmethod
    def open(cls, spec: str, *, before: Sequence[str] | None = None) -> ShardSet:
        """Open every shard that a spec names (braces, globs, `::` lists; paths and URLs; sets;
        or a catalogue).

        DataError where a shard or its index is missing, a shard's size is not the indexed one,
        or two samples have one id. Where samples of two folders would, and no set is named, each
        folder is a set that is called after what tells it from the others. Local indexes stay on
        disk; remote ones are fetched once. `before` are the `lines` of a set that this one has to
        be, in whose order the shards then come; DataError where they are others.
        """
        opened = cls._catalogued(spec) if is_catalogue(spec) else cls._listed(spec)
        return opened if before is None else opened._in_order_of(before)

    @classmethod
    def _listed(cls, spec: str) -> ShardSet:
        listed = expand_sets(spec)
        shards = [path for _, path in listed]
        found = inspect_shards(shards)
        remote = {
            shard: look.remote_index
            for shard, look in zip(shards, found, strict=True)
            if is_remote(shard)
        }
        return cls(
            shards,
            [look.summary.num_samples for look in found],
            remote,
            sets=[name for name, _ in listed],
            digests=[look.summary.digest.hex() for look in found],
        ).distinct()

    @classmethod
    def _catalogued(cls, spec: str) -> ShardSet:
        """What a catalogue says. No shard is looked at before a sample of it is read."""
        catalogue = open_catalogue(spec.strip())
        table = catalogue.table
        return cls(
            table.shards,
            table.sizes,
            {},
            sets=table.sets,
            digests=table.digests,
            catalogue=catalogue,
        )

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
        """The sample ids of all samples, in order; read from the indexes on first use.

        8 bytes a sample; of a catalogue they stay on disk.
        """
        starts = self._starts
        if self._catalogue is not None:
            column = self._catalogue.ids()
            if self._rows is None:
                return column
            begins = np.concatenate([[0], np.cumsum(self._catalogue.table.sizes)])
            return np.concatenate([column[begins[row] : begins[row + 1]] for row in self._rows])
        found = np.empty(len(self), np.int64)
        for shard in range(len(self.shards)):
            found[starts[shard] : starts[shard + 1]] = self._index(shard).ids
        return found

    def some(self, count: int, *, shards: int = 64) -> NDArray[np.int64]:
        """`count` samples at most, evenly out of a few shards that lie evenly in the list."""
        chosen = np.unique(np.linspace(0, len(self.shards) - 1, shards).astype(np.int64))
        sizes = np.asarray(self.sizes, dtype=np.int64)[chosen]
        ends = np.cumsum(sizes)
        places = np.unique(np.linspace(0, ends[-1] - 1, min(count, ends[-1])).astype(np.int64))
        which = np.searchsorted(ends, places, side="right")
        return self._starts[chosen][which] + places - (ends - sizes)[which]

    def find(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """(sample, its id) of those of `ids` that are here, in the order of the list.

        Shard after shard, until all are found: the ids of all samples are never held.
        """
        wanted = np.unique(np.asarray(ids, dtype=np.int64))
        found: list[tuple[int, int]] = []
        for shard, start in enumerate(self._starts[:-1].tolist()):
            if len(found) == len(wanted):
                break
            here = self._index(shard).ids
            rows = np.flatnonzero(np.isin(here, wanted))
            found += [(start + int(row), int(here[row])) for row in rows]
        return found

    @property
    def has_remote(self) -> bool:
        """Whether samples are read from servers, one by one."""
        return self._cache is None and self._any_remote

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

    def keep_in(self, cache: ShardCache) -> None:
        """Fetch remote shards whole into a cache from now on, and read them from there."""
        self._cache = cache
        self.close()

    def read(self, index: int) -> RawSample:
        """Read one sample: all its members in one request, each checked by its CRC-32.

        DamagedSample where a header or member differs from the index, and where a table's row or
        its picture can't be read; DataError where the shard has another size than the indexed one.
        """
        return self._read(index, only=None)

    def read_json(self, index: int) -> RawSample:
        """Read no other member than the one that ends in `.json`, if there is one; the whole row
        of a table, Parquet or Arrow file. The same errors."""
        return self._read(index, only="json")

    def _read(self, index: int, *, only: str | None) -> RawSample:
        shard, row = self.locate(index)
        columns, name = self._index(shard), self.shards[shard]
        if is_columnar(name):
            return self._columnar_sample(shard, row)
        fetch = partial(self._bytes, shard)
        return read_members(columns, row, name, fetch, only=None if is_table(name) else only)

    def _columnar_sample(self, shard: int, row: int) -> RawSample:
        """One row of a Parquet or Arrow file; its one member is named by the layout."""
        columns, name = self._index(shard), self.shards[shard]
        key, layout = columns.keys[row], columns.suffixes[columns.suffix[row]]
        near = None
        if self._cache is not None and is_remote(name):
            near = partial(self._cache.open, name, columns.shard_bytes)
        try:
            fields = self._columnar.read(
                *(name, int(columns.offset[row])),
                crc=int(columns.crc[row]),
                layout=layout,
                near=near,
            )
        except BadRow as error:
            raise DamagedSample(f"{name}: {key}: {error}") from None
        return RawSample(int(columns.ids[row]), name, key, fields)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._files.close()
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        """What a worker process needs: no open file and no parsed index."""
        return {
            "shards": self.shards,
            "sizes": self.sizes,
            "remote": self._remote_indexes,
            "sets": self.sets,
            "digests": self.digests,
            "catalogue": self._catalogue,
            "rows": self._rows,
            "cache": self._cache,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _forget(self) -> None:
        self._files = OpenFiles(self._cache)
        self._columnar = ColumnarFiles()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            if len(self._indexes) >= OPEN_SHARDS:
                self._indexes.popitem(last=False)
            self._indexes[shard] = self._load_index(shard)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _load_index(self, shard: int) -> ShardIndex:
        name = self.shards[shard]
        index = read_index(name, self._index_bytes(shard))
        if len(index.keys) != self.sizes[shard]:
            raise DataError(
                f"{index_path(name)} changed: {self.sizes[shard]} samples when it was opened, "
                f"now {len(index.keys)}; start again"
            )
        return index._replace(ids=ids_in_set(index.ids, self.sets[shard]))

    def _index_bytes(self, shard: int) -> bytes | None:
        """The index of a shard where it is not read from beside it."""
        if self._catalogue is None:
            return self._remote_indexes.get(self.shards[shard])
        return self._catalogue.index_bytes(shard if self._rows is None else self._rows[shard])

    def _bytes(self, shard: int, start: int, end: int) -> bytes:
        name = self.shards[shard]
        if is_remote(name) and self._cache is None:
            return read_range(name, start, end)
        size = self._index(shard).shard_bytes
        return self._files.read(name, start, end, expected=size, samples=self.sizes[shard])

    def distinct(self) -> ShardSet:
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
            catalogue=self._catalogue,
            rows=[row if self._rows is None else self._rows[row] for row in rows],
        )
