"""Indexes of many shards, made by several processes; and the catalogue of them all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from trainer.addresses import without_secrets
from trainer.data.index import index_path, write_index
from trainer.data.remote import expand_shards, file_size
from trainer.data.tables import Columns
from trainer.errors import TrainerError
from trainer.long_work import counted, tell
from trainer.programs.catalogue import make_catalogue

_SHARDS_PER_WORKER = 16  # starting a process takes as long as indexing some


class Outcome(NamedTuple):
    """What became of one shard."""

    samples: int
    said: str
    failed: bool = False


def index_shards(
    spec: str,
    *,
    columns: Columns,
    max_member_bytes: int,
    missing: bool,
    workers: int | None,
    catalogue: str | None,
) -> int:
    """Index every shard of a spec and say what became of each; the exit code, 2 where one failed.

    `workers` processes, by the number of shards and cores where None. Where all have an index, they
    are put into one file `catalogue`, if it is named.
    """
    shards = expand_shards(spec)
    wanted = workers or -(-len(shards) // _SHARDS_PER_WORKER)
    processes = min(wanted, workers or os.cpu_count() or 1, len(shards))
    index = partial(_index, missing=missing, most=max_member_bytes, columns=columns)
    outcomes = []
    for outcome in counted(
        _each(index, shards, workers=processes), "indexing", total=len(shards), unit="shards"
    ):
        outcomes.append(outcome)
        if not outcome.failed:
            tell(outcome.said)
    sys.stdout.write(_in_all(outcomes, missing=missing))
    if any(outcome.failed for outcome in outcomes):
        _complain([outcome.said for outcome in outcomes if outcome.failed], len(shards))
        return 2
    if catalogue is not None:
        count = make_catalogue(spec, catalogue)
        sys.stdout.write(f"{catalogue}: {count} samples of {len(shards)} shards\n")
    return 0


def _each(index: partial[Outcome], shards: Sequence[str], *, workers: int) -> Iterator[Outcome]:
    if workers <= 1:
        yield from map(index, shards)
        return
    # not fork: listing remote shards may have started threads
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(index, shards)


def _index(shard: str, *, missing: bool, most: int, columns: Columns) -> Outcome:
    """Index one shard; what is wrong with it must not keep the others from theirs."""
    skipped: list[str] = []
    try:
        if missing and _has_index(shard):
            return Outcome(0, f"{shard}: has an index")
        count = write_index(shard, max_member_bytes=most, skipped=skipped, columns=columns)
    except FileNotFoundError:
        return Outcome(0, f"no shard {shard}", failed=True)
    except (TrainerError, OSError) as error:
        said = str(error)
        return Outcome(0, said if shard in said else f"{shard}: {said}", failed=True)
    stray = f", skipped {len(skipped)} members of no sample, as {skipped[0]!r}" if skipped else ""
    return Outcome(count, f"{shard}: {count} samples{stray}")


def _has_index(shard: str) -> bool:
    try:
        return file_size(index_path(shard)) > 0
    except FileNotFoundError:
        return False


def _in_all(outcomes: Sequence[Outcome], *, missing: bool) -> str:
    samples = sum(outcome.samples for outcome in outcomes)
    return f"{samples} samples{' in what had no index' if missing else ''}\n"


def _complain(said: Sequence[str], count: int) -> None:
    if len(said) == 1:
        sys.stderr.write(f"error: {without_secrets(said[0])}\n")
        return
    lines = "".join(f"\n  {without_secrets(each)}" for each in said)
    sys.stderr.write(
        f"error: {len(said)} of {count} shards have no index, the others have:{lines}\n"
    )
