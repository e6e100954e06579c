"""Measure speed and memory as ratios.

Examples:
  python tools/bench.py step --json rows.json
  python tools/bench.py kmeans --help

Every benchmark prints a table and takes `--json FILE`. What to look at on a machine that is busy
with other things is CPU time; what to believe is a ratio, never the seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.bench import BENCHES
from trainer.bench.table import format_rows
from trainer.command import parser_of, run_command


def main() -> None:
    chosen = _parser().parse_args()
    bench = importlib.import_module(BENCHES[chosen.bench])
    command = argparse.ArgumentParser(
        prog=f"bench.py {chosen.bench}",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_options(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    options = command.parse_args(chosen.options)
    rows = bench.measure_options(options)
    print(format_rows(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the benchmark")
    return parser


if __name__ == "__main__":
    run_command(main)
