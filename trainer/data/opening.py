"""What a look at each shard of a list finds out: whether it is there, as its index says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from trainer.data.columnar import COLUMNAR
from trainer.data.index import HEADER_BYTES, IndexSummary, index_path, read_summary
from trainer.data.remote import file_size, is_remote, read_file
from trainer.data.tables import ENDINGS
from trainer.errors import DataError

T = TypeVar("T")

_NAMED = 8  # missing shards that a sentence names
_INDEX_SHARE = 64  # an index of a table's shortest rows has not as many bytes to each of the table
_THREADS = 16  # remote sizes and indexes are fetched side by side


class Inspected(NamedTuple):
    """A shard that is there and of the size that its index says."""

    summary: IndexSummary
    remote_index: bytes
    """All of a remote index; nothing of a local one."""


def inspect_shards(shards: Sequence[str]) -> list[Inspected]:
    """Look at every shard. DataError where one or its index is missing, or of another size."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return _all_there(shards, list(threads.map(_inspect, shards)))


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


def _inspect(shard: str) -> Inspected | None:
    """The index's header after comparing the shard's size with it, and a remote index's bytes.

    None where there is no shard.
    """
    path = index_path(shard)
    if not is_remote(shard) and os.path.isdir(shard):
        pattern = os.path.join(shard, f"*{_ending(os.listdir(shard))}")
        raise DataError(f"{shard} is a folder; name its shards, as {pattern}")
    try:
        found = file_size(shard)
    except FileNotFoundError:
        return None
    try:
        most = _INDEX_SHARE * found + HEADER_BYTES
        data = read_file(path, at_most=most) if is_remote(path) else _first_bytes(path)
    except FileNotFoundError:
        raise DataError(f"no index {path}; build it: python tools/index.py '{shard}'") from None
    summary = read_summary(data[:HEADER_BYTES], path=path)
    if found != summary.shard_bytes:
        raise wrong_size(shard, summary.shard_bytes, found, summary.num_samples)
    return Inspected(summary, data if is_remote(path) else b"")


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEADER_BYTES)


def wrong_size(shard: str, expected: int, found: int, samples: int | None = None) -> DataError:
    counted = "" if samples is None else f" ({samples} samples)"
    verdict = "truncated" if found < expected else "changed"
    return DataError(
        f"{shard} is {verdict}: its index expects {expected} bytes{counted}, found {found}; get "
        f"the shard again, or if it is right: python tools/index.py '{shard}'"
    )


def _ending(names: Sequence[str]) -> str:
    """Of what a folder seems to hold, the kind that others lie beside last."""
    found = {os.path.splitext(name)[1] for name in names}
    return next((each for each in (".tar", *COLUMNAR, *ENDINGS) if each in found), ".tar")
