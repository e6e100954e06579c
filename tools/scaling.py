"""Scaling studies: what one would cost, its trainings, its laws, and their report.

Examples:
  python tools/scaling.py plan launch/runs/scaling_laion400m.yaml --card h100 --world-size 64
  python tools/scaling.py sweep STUDY.yaml --part 2/8
  python tools/scaling.py show STUDY.yaml
  python tools/scaling.py fit STUDY.yaml
  python tools/scaling.py report STUDY.yaml --points points.csv
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.command import run_command
from trainer.errors import ConfigError
from trainer.plan.cards import UTILISATION
from trainer.programs.scaling import fit_study, plan_study, report, told, write_laws
from trainer.programs.sweep import all_costs, sweep
from trainer.programs.sweep_table import told_table
from trainer.scaling.study import load_study


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("plan", "sweep", "show", "fit", "report"))
    parser.add_argument("study", type=Path, help="such as launch/runs/scaling_laion400m.yaml")
    parser.add_argument("--card", default="h100", help="of `plan`: what the study would run on")
    parser.add_argument("--world-size", type=int, default=64, help="of `plan`: devices at once")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help="of `plan`")
    parser.add_argument(
        "--part", default=None, help="of `sweep`: 2/8 is the second of eight workers"
    )
    parser.add_argument(
        "--minutes", type=float, help="of `sweep`: stop then; the same command goes on"
    )
    parser.add_argument("--points", type=Path, help="of `fit`, `report`: a CSV of other points")
    arguments = parser.parse_args()
    study = load_study(arguments.study)
    if arguments.action == "plan":
        size = arguments.world_size
        print(
            plan_study(
                study, card=arguments.card, world_size=size, utilisation=arguments.utilisation
            )
        )
    elif arguments.action == "sweep":
        part, parts = _part(arguments.part)
        print(sweep(study, part=part, parts=parts, minutes=arguments.minutes))
    elif arguments.action == "show":
        print(told_table(all_costs(study)))
    else:
        found = fit_study(study, arguments.points)
        print(told(found))
        print(write_laws(study, found))
        if arguments.action == "report":
            print(report(study, found))


def _part(text: str | None) -> tuple[int, int]:
    """Of this worker, from 0, and how many there are: as said, else as a Slurm array's task is."""
    if text is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        task = int(os.environ["SLURM_ARRAY_TASK_ID"]) - first
        return task, int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    try:
        number, of = (text or "1/1").split("/")
        return int(number) - 1, int(of)
    except ValueError:
        raise ConfigError(f"--part {text}: write 2/8 for the second of eight workers") from None


if __name__ == "__main__":
    run_command(main)
