"""Build the indexes of shards and tables, once before they are read.

Examples:
  python tools/index.py 'shards/{000..127}.tar'
  python tools/index.py pairs.csv --image-column path --caption-column title
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.data.index import MAX_MEMBER_BYTES, index_path, write_index
from trainer.data.remote import expand_shards
from trainer.data.tables import Columns
from trainer.errors import TrainerError
from trainer.long_work import counted, tell

_SHARDS_PER_WORKER = 16  # starting a process takes as long as indexing some


class Outcome(NamedTuple):
    """What became of one shard."""

    samples: int
    said: str
    failed: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="paths or URLs; braces, globs and :: lists")
    parser.add_argument("--image-column", help="of a table: a path or URL a row (image)")
    parser.add_argument("--caption-column", help="of a table (caption, where it has one)")
    parser.add_argument("--key-column", help="of a table: a name a row (key, or the row's number)")
    parser.add_argument("--max-member-bytes", type=int, default=MAX_MEMBER_BYTES)
    parser.add_argument("--missing", action="store_true", help="leave local indexes that are there")
    parser.add_argument("--workers", type=int, help="processes; by the number of shards and cores")
    arguments = parser.parse_args()
    shards = expand_shards("::".join(arguments.shards))
    wanted = arguments.workers or -(-len(shards) // _SHARDS_PER_WORKER)
    workers = min(wanted, arguments.workers or os.cpu_count() or 1, len(shards))
    columns = Columns(arguments.image_column, arguments.caption_column, arguments.key_column)
    index = partial(
        _index, missing=arguments.missing, most=arguments.max_member_bytes, columns=columns
    )
    outcomes = []
    for outcome in counted(
        _each(index, shards, workers=workers), "indexing", total=len(shards), unit="shards"
    ):
        outcomes.append(outcome)
        if not outcome.failed:
            tell(outcome.said)
    print(f"{sum(outcome.samples for outcome in outcomes)} samples")
    if any(outcome.failed for outcome in outcomes):
        _complain([outcome.said for outcome in outcomes if outcome.failed], len(shards))
        return 2
    print("next: python tools/embed.py --teacher efficientnet-lite0 --data SHARDS --out STORE")
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
    if missing and Path(index_path(shard)).exists():
        return Outcome(0, f"{shard}: has an index")
    skipped: list[str] = []
    try:
        count = write_index(shard, max_member_bytes=most, skipped=skipped, columns=columns)
    except FileNotFoundError:
        return Outcome(0, f"no shard {shard}", failed=True)
    except (TrainerError, OSError) as error:
        said = str(error)
        return Outcome(0, said if shard in said else f"{shard}: {said}", failed=True)
    stray = f", skipped {len(skipped)} members of no sample, as {skipped[0]!r}" if skipped else ""
    return Outcome(count, f"{shard}: {count} samples{stray}")


def _complain(said: Sequence[str], count: int) -> None:
    if len(said) == 1:
        print(f"error: {said[0]}", file=sys.stderr)
        return
    lines = "".join(f"\n  {each}" for each in said)
    print(
        f"error: {len(said)} of {count} shards have no index, the others have:{lines}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
