"""python -m trainer RUN.yaml [key=value ...] -- the same under deepspeed, torchrun or accelerate.

`python -m trainer doctor [RUN.yaml]` looks at machine, data and workdir, and trains nothing.

Exit codes: 0 finished, or stopped by a signal with everything saved; 2 a mistake in the
configuration, the data or the checkpoints, explained in one sentence; 3 a rank was lost
or hangs, and the same command goes on; 1 our own bug.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from trainer.command import run_command
from trainer.config import RunConfig, load_run
from trainer.errors import ConfigError
from trainer.launchers import refuse_missing_hostfile
from trainer.log.facts import facts_of
from trainer.together import Facts, prepared_together

if TYPE_CHECKING:
    from trainer.loop import Outcome


def main() -> None:
    if sys.argv[1:2] == ["doctor"]:
        sys.exit(importlib.import_module("trainer.doctor.main").doctor(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("run", help="a YAML file, such as launch/runs/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="dotted key=value, such as steps=100 or evals.0.limit=50"
    )
    parser.add_argument(
        "--plan",
        nargs="*",
        metavar="key=value",
        help="train nothing: say what it would cost, as --plan world_size=64 card=h100",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    arguments = parser.parse_args()
    if arguments.plan is not None:
        from trainer.plan.told import plan_text

        print(plan_text(load_run(arguments.run, arguments.overrides), arguments.plan))
        return
    is_main = os.environ.get("RANK", "").strip() in {"", "0"}
    config = prepared_together(partial(_prepared, arguments.run, arguments.overrides))
    from trainer.log.printed import note
    from trainer.loop import train

    outcome = train(config)
    if is_main:
        said = _ended(outcome, config)
        print(said)
        note(config.workdir, said)


def _ended(outcome: Outcome, config: RunConfig) -> str:
    step, workdir = outcome.progress.step, config.workdir
    if not outcome.finished:
        return f"stopped at step {step} of {config.steps}; the same command goes on from here"
    if outcome.steps_now or outcome.evaluations_owed:
        return f"finished {step} steps; checkpoint in {workdir / 'checkpoints'}"
    return f"nothing left to do: {workdir} already holds step {step} of {config.steps}"


def _prepared(run: str, overrides: list[str]) -> tuple[RunConfig, list[Facts]]:
    """What this host has to say before any rank waits for another."""
    refuse_missing_hostfile()
    config = load_run(run, overrides)
    try:
        importlib.import_module("trainer.loop")  # and deepspeed, behind the cheap mistakes
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed here; pip install -r requirements.txt"
        ) from error
    return config, facts_of(config)


if __name__ == "__main__":
    run_command(main)
