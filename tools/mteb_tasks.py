r"""Measure an exported pair of towers by the `mteb` package, on shards of one's own.

Examples:
  python tools/mteb_tasks.py runs/quickstart/export --data data/open/val-000000.tar \
      --target concept --caption name
  python tools/mteb_tasks.py models/mine --data 'imagenet/val-{000000..000063}.tar' \
      --target cls --template 'a photo of a {}.' --out mine.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import parser_of, run_command
from trainer.errors import ConfigError
from trainer.programs.mteb_tasks import measure


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.target is None and arguments.caption is None:
        raise ConfigError("nothing to measure; give --target, --caption or both")
    found = measure(
        arguments.folder.expanduser(),
        arguments.data,
        target=arguments.target,
        caption=arguments.caption,
        template=arguments.template,
        batch=arguments.batch,
    )
    for task, scores in found.items():
        main_score = f"{scores['main_score']:.4f}" if "main_score" in scores else "no score"
        print(f"{task}: {main_score}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, help="what tools/export.py wrote")
    parser.add_argument("--data", required=True, help="shards")
    parser.add_argument("--target", help="key of a sample's json with its class: zero-shot")
    parser.add_argument("--caption", help="key with its text or texts: retrieval both ways")
    parser.add_argument("--template", default="{}", help="prompt of a class name; default {}")
    parser.add_argument("--batch", type=int, default=64, help="rows at a time; default 64")
    parser.add_argument("--out", type=Path, help="a JSON file for every score")
    return parser


if __name__ == "__main__":
    run_command(main)
