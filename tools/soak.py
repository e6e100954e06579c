"""Random faults against a real run, until it is done: python tools/soak.py --minutes 30 --ranks 2

A fault-free run comes first. Then the same run is started again and again, and something happens to
it at a random moment: a rank is killed, stands still, or is asked to stop; the newest checkpoint is
damaged. At the end the weights must be the fault-free run's bytes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from trainer.command import parser_of, run_command
from trainer.programs.soak import soak


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", default="launch/runs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of both runs")
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    given = parser.parse_args()
    report = soak(
        *(given.run, given.overrides, given.out),
        minutes=given.minutes,
        ranks=given.ranks,
        seed=given.seed,
    )
    print(report)


if __name__ == "__main__":
    run_command(main)
