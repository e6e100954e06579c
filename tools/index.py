"""Build the indexes of shards: python tools/index.py 'shards/{000..127}.tar' ..."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.data.index import MAX_MEMBER_BYTES, index_path, write_index
from trainer.data.remote import expand_shards
from trainer.errors import TrainerError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+", help="paths or URLs; braces, globs and :: lists")
    parser.add_argument("--max-member-bytes", type=int, default=MAX_MEMBER_BYTES)
    parser.add_argument("--missing", action="store_true", help="leave local indexes that are there")
    arguments = parser.parse_args()
    total = 0
    for shard in expand_shards("::".join(arguments.shards)):
        if arguments.missing and Path(index_path(shard)).exists():
            print(f"{shard}: has an index")
            continue
        count = write_index(shard, max_member_bytes=arguments.max_member_bytes)
        total += count
        print(f"{shard}: {count} samples")
    print(f"{total} samples")
    print("next: python tools/embed.py --teacher efficientnet-lite0 --data SHARDS --out STORE")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
