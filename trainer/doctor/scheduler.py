"""Whether a job ends before its run can save: Slurm's limits against the run's."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

from trainer.config import RunConfig
from trainer.doctor.finding import Finding

LEAST_MINUTES = 5.0


def scheduler(config: RunConfig) -> Iterator[Finding]:
    """Nothing outside of a Slurm job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    said = _shown(job)
    if said is None:
        yield Finding("slurm", f"scontrol does not know job {job}", blocks=False)
        return
    limit = _minutes(_field(said, "TimeLimit"))
    if limit is not None and limit <= _save_minutes(config):
        yield Finding(
            "time limit",
            f"the job ends after {limit:g} minutes, and the run saves every {config.save_every}; "
            "ask for more (--time) or save more often",
        )
    elif limit is not None and limit < LEAST_MINUTES:
        yield Finding("time limit", f"{limit:g} minutes hardly hold a start and a save (--time)")
    else:
        yield Finding("time limit", said="none" if limit is None else f"{limit:g} minutes")
    if _field(said, "Requeue") == "0":
        yield Finding(
            "requeue",
            "the job may not go back into the queue (Requeue=0), so a preempted run ends there; "
            "sbatch --requeue",
            blocks=False,
        )


def _shown(job: str) -> str | None:
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _field(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", text)
    return found[1] if found else ""


def _minutes(text: str) -> float | None:
    """Of `1-02:03:04`, `02:03:04`, `03:04`; None where there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60


def _save_minutes(config: RunConfig) -> float:
    return config.save_every.count if config.save_every.unit == "min" else 0.0
