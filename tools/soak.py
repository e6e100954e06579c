"""Random faults against a real run, until it is done: python tools/soak.py --minutes 30 --ranks 2

A run is started again and again, and something happens to it in a random phase or at a random time:
ranks or their launcher are killed, stand still, or are asked to stop; the newest checkpoint is
damaged, a log torn, the disk slow. At its end comes the same run without faults, whose bytes its
weights must be; then the next one, until the time is over. A disk of at most 1 GiB under --out, as
a tmpfs that is mounted there, is filled up too. A run with the key `spikes` gets a loss that jumps.

With --ends N no run is needed: N pairs of ranks meet, train a little, save beside it and end, and
their exit codes are counted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from trainer.command import parser_of, run_command
from trainer.programs.ends import ends
from trainer.programs.soak import soak


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", default="launch/runs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted key=value")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="folder of both runs")
    parser.add_argument("--minutes", type=float, default=30.0, help="of faults")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--ends", type=int, metavar="N", help="end N pairs of ranks instead")
    given = parser.parse_args()
    if given.ends is not None:
        codes = ends(given.ends, say=print)
        print(f"{given.ends} pairs of ranks ended by {dict(codes)}")
        sys.exit(0 if set(codes) == {"0"} else 1)
    report = soak(
        *(given.run, given.overrides, given.out),
        minutes=given.minutes,
        ranks=given.ranks,
        seed=given.seed,
    )
    print(report)


if __name__ == "__main__":
    run_command(main)
