"""Build the indexes of shards and tables, once before they are read.

Examples:
  python tools/index.py 'shards/{000..127}.tar'
  python tools/index.py pairs.csv --image-column path --caption-column title
  python tools/index.py 'hub/train-*.parquet' --image-column img --caption-column text
  python tools/index.py 's3://bucket/{00000..41407}.tar' --missing --catalogue laion.catalogue
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.data.index import MAX_MEMBER_BYTES
from trainer.data.tables import Columns
from trainer.errors import TrainerError
from trainer.programs.index import index_shards


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="paths or URLs; braces, globs and :: lists")
    parser.add_argument("--image-column", help="of a table: a path or URL a row (image)")
    parser.add_argument("--caption-column", help="of a table (caption, where it has one)")
    parser.add_argument("--key-column", help="of a table: a name a row (key, or the row's number)")
    parser.add_argument("--max-member-bytes", type=int, default=MAX_MEMBER_BYTES)
    parser.add_argument("--missing", action="store_true", help="leave indexes that are there")
    parser.add_argument("--workers", type=int, help="processes; by the number of shards and cores")
    parser.add_argument(
        "--catalogue",
        help="then one file of all indexes: many ranks open it at once, as data.train",
    )
    arguments = parser.parse_args()
    failed = index_shards(
        "::".join(arguments.shards),
        columns=Columns(arguments.image_column, arguments.caption_column, arguments.key_column),
        max_member_bytes=arguments.max_member_bytes,
        missing=arguments.missing,
        workers=arguments.workers,
        catalogue=arguments.catalogue,
    )
    if not failed:
        spec = arguments.catalogue or "::".join(arguments.shards)
        print(f"next: bash launch/local.sh RUN.yaml data.train={shlex.quote(spec)}")
    return failed


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TrainerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
