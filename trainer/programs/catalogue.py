"""Making the catalogue of a shard list out of the indexes of its shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.data.catalogue import Entry, write_catalogue
from trainer.data.index import ids_in_set, index_path, read_index
from trainer.data.opening import inspect_shards
from trainer.data.remote import expand_sets, read_file
from trainer.data.shards import ShardSet
from trainer.long_work import counted

_AT_ONCE = 64


def make_catalogue(spec: str, path: str) -> int:
    """Write the catalogue of all shards that a spec names; the number of its samples.

    Where samples of two folders would have one id, folders become sets, as they do where the shards
    are opened one by one. DataError where shards can't be opened together.
    """
    listed = expand_sets(spec)
    draft = f"{path}.draft.catalogue"
    try:
        count = write_catalogue(draft, _entries(listed))
        opened = ShardSet.open(draft)
        distinct = opened.distinct()
        if distinct is not opened:
            named = zip(distinct.sets, (shard for _, shard in listed), strict=True)
            write_catalogue(draft, _entries(list(named)))
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
    return count


def _entries(listed: Sequence[tuple[str, str]]) -> Iterator[Entry]:
    return counted(_each(listed), "cataloguing", total=len(listed), unit="shards")


def _each(listed: Sequence[tuple[str, str]]) -> Iterator[Entry]:
    for start in range(0, len(listed), _AT_ONCE):
        some = listed[start : start + _AT_ONCE]
        looks = inspect_shards([shard for _, shard in some])
        for (name, shard), look in zip(some, looks, strict=True):
            index = look.remote_index or read_file(index_path(shard))
            ids = ids_in_set(read_index(shard, index).ids, name)
            yield Entry(shard, name, index, look.summary.digest.hex(), ids)
