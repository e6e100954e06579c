"""Make indexed shards from an ImageFolder, a table, Parquet, COCO-style JSON or a saved dataset.

Examples:
  python tools/make_shards.py folder pictures/ --out shards/birds
  python tools/make_shards.py table pairs.tsv --image-column path --out shards/pairs
  python tools/make_shards.py parquet data/ --out shards
  python tools/make_shards.py coco captions_train2017.json --images train2017/ --out shards/coco
  python tools/make_shards.py datasets saved/train --out shards
The same command goes on where it was stopped. Next: data.train='shards/{000000..000123}.tar'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import parser_of, run_command
from trainer.errors import ConfigError, DataError
from trainer.programs.make_shards import make_shards
from trainer.programs.shard_sources import (
    Columns,
    Item,
    coco,
    image_folder,
    let_it_wag,
    parquet,
    saved_dataset,
    table,
)


def main() -> None:
    arguments = _parser().parse_args()
    if not arguments.source.exists():
        raise DataError(f"there is no {arguments.source}")
    about = {
        "kind": arguments.kind,
        "source": arguments.source.name,
        "image_column": arguments.image_column,
        "caption_column": arguments.caption_column,
    }
    made = make_shards(_items(arguments), arguments.out, about=about, per_shard=arguments.per_shard)
    there = f", {made.already_there} were there already" if made.already_there else ""
    print(f"{made.samples} samples in {made.shards} new shards in {arguments.out}{there}")
    if made.skipped:
        print(f"{made.skipped} samples could not be read; see {arguments.out / 'skipped.tsv'}")
    last = made.shards + made.already_there - 1
    print(f"next: data.train='{arguments.out}/{{000000..{last:06d}}}.tar'")


def _items(arguments: argparse.Namespace) -> Iterator[Item]:
    columns = Columns(arguments.image_column, arguments.caption_column)
    match arguments.kind:
        case "folder":
            return image_folder(arguments.source)
        case "let-it-wag":
            return let_it_wag(arguments.source)
        case "table":
            return table(arguments.source, columns)
        case "parquet":
            return parquet(arguments.source, columns)
        case "datasets":
            return saved_dataset(arguments.source, columns)
    if arguments.images is None:
        raise ConfigError("coco needs --images FOLDER, where the pictures are")
    return coco(arguments.source, arguments.images)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    kinds = ("folder", "table", "parquet", "coco", "datasets", "let-it-wag")
    parser.add_argument("kind", choices=kinds, help="what the source is")
    parser.add_argument("source", type=Path, help="file or folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples (1000)")
    parser.add_argument("--image-column", default="image", help="of a table: path or bytes")
    parser.add_argument("--caption-column", default="caption", help="of a table")
    parser.add_argument("--images", type=Path, help="of coco: folder of the pictures")
    return parser


if __name__ == "__main__":
    run_command(main)
