"""The command `python -m trainer doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from trainer.doctor.finding import Finding
from trainer.doctor.machine import machine
from trainer.doctor.run import run_file


def findings(path: str | None, overrides: Sequence[str] = (), *, ranks: int) -> Iterator[Finding]:
    yield from machine()
    if path is not None:
        yield from run_file(path, overrides, ranks=ranks)


def doctor(arguments: Sequence[str]) -> int:
    """Print what was looked at, a line each; the exit code, 2 where a run can't go well."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer doctor",
        description="Look at this machine, and at all that RUN.yaml names, before a run begins.",
    )
    parser.add_argument("run", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", help="dotted key=value")
    parser.add_argument("--ranks", type=int, help="processes that would train; else as launched")
    given = parser.parse_args(arguments)
    told = os.environ.get("WORLD_SIZE", "")
    ranks = given.ranks or (int(told) if told.isdigit() else torch.cuda.device_count() or 1)
    blocked = 0
    for finding in findings(given.run, given.overrides, ranks=max(ranks, 1)):
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
        blocked += bool(finding.wrong) and finding.blocks
    sys.stdout.write(f"{blocked} to mend\n" if blocked else "nothing that would stop a run\n")
    return 2 if blocked else 0
