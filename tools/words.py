"""The words that a run of LexVLA says, as figures and a page: python tools/words.py WORKDIR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import run_command
from trainer.programs.words import words_of_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for folders that have moved")
    parser.add_argument("--data", help="shards; those of the run's first evaluation")
    parser.add_argument("--out", type=Path, help="the page; WORKDIR/pictures/words.html")
    parser.add_argument("--limit", type=int, default=512, help="images that are read")
    parser.add_argument("--shown", type=int, default=24, help="images, and words, on the page")
    arguments = parser.parse_args()
    path, figures = words_of_run(
        arguments.workdir.expanduser(),
        arguments.data,
        out=arguments.out,
        limit=arguments.limit,
        shown=arguments.shown,
        overrides=arguments.overrides,
    )
    for name, value in figures.items():
        print(f"{value:10.4g}  {name}")
    print(path)


if __name__ == "__main__":
    run_command(main)
