"""Run a grid of variants and seeds, and print its table.

Examples:
  python tools/compare.py launch/runs/compare_protoclip.yaml
  python tools/compare.py launch/runs/compare_protoclip.yaml --devices 0,1,2,3
  python tools/compare.py launch/runs/compare_protoclip.yaml --ranks 2 --devices 0,1,2,3
  python tools/compare.py launch/runs/compare_protoclip.yaml --table
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import parser_of, run_command
from trainer.errors import ConfigError
from trainer.programs.compare import Spread, load_comparison, run_comparison, write_table


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("grid", type=Path, help="such as launch/runs/compare_protoclip.yaml")
    parser.add_argument("--table", action="store_true", help="show what is finished, run nothing")
    parser.add_argument("--ranks", type=int, default=1, help="processes of each cell; default 1")
    parser.add_argument(
        "--devices", help="cards by number, as 0,1,2,3: cells run beside each other, a card a rank"
    )
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    arguments = parser.parse_args()
    comparison = load_comparison(arguments.grid)
    if arguments.table:
        print(write_table(comparison))
        return
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks is {arguments.ranks}; a cell has at least one")
    devices = tuple(filter(None, (arguments.devices or "").split(",")))
    spread = Spread(ranks=arguments.ranks, devices=devices)
    print(run_comparison(comparison, spread, minutes=arguments.minutes))


if __name__ == "__main__":
    run_command(main)
