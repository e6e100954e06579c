"""Evaluate a run's newest weights: python tools/evaluate.py WORKDIR [key=value ...] [--table].

The evaluations are those of the run's YAML; `deepspeed`, `torchrun` or plain python spread them
over their ranks. `--table` shows what training wrote at its end instead of measuring again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer.comm import Comm
from trainer.command import run_command
from trainer.config import Weights
from trainer.evals.table import format_table
from trainer.programs.workdir import evaluate_workdir, logged_results

WEIGHTS_HELP = "of which weights all evaluations are; as each of them says where not given"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, for folders that have moved")
    parser.add_argument("--table", action="store_true", help="show the figures logged at the end")
    parser.add_argument("--weights", choices=get_args(Weights), help=WEIGHTS_HELP)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table and arguments.weights:
        parser.error("--table shows what was logged, of the weights that each evaluation names")
    comm = Comm.solo() if arguments.table else Comm.from_environment()
    workdir = arguments.workdir.expanduser()
    results = (
        logged_results(workdir)
        if arguments.table
        else evaluate_workdir(workdir, comm, arguments.overrides, weights=arguments.weights)
    )
    if comm.is_main:
        print(format_table(results))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
