"""Run a grid of variants and seeds and print its table: python tools/compare.py GRID.yaml."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import run_command
from trainer.programs.compare import load_comparison, run_comparison, write_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", type=Path, help="such as launch/runs/compare_protoclip.yaml")
    parser.add_argument("--table", action="store_true", help="show what is finished, run nothing")
    arguments = parser.parse_args()
    comparison = load_comparison(arguments.grid)
    print((write_table if arguments.table else run_comparison)(comparison))


if __name__ == "__main__":
    run_command(main)
