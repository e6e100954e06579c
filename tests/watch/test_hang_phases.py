"""A rank that hangs is named with what it does, in every phase; the next start goes on from there.

One run is started again and again. Each start hangs in another phase, and the last one comes to
what a run without any of it comes to.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.test_launch import losses
from tests.watch.runs import Ranks, run_file

HOST = os.uname().nodename
KEYS = ("save_every=2 steps", "hang_seconds=25", "save_beside={beside}")
HANGS = """
import os, time
from contextlib import contextmanager
from pathlib import Path
from trainer.pulse import Pulse
def for_ever():
    Path({folder!r}, "hangs").touch()
    time.sleep(1000)
if os.environ["RANK"] == "{rank}":
    phase, entered = Pulse.phase, [0]
    @contextmanager
    def hangs(self, name):
        with phase(self, name):
            entered[0] += (here := name.startswith({phase!r}))
            if here and entered[0] == {times}:
                for_ever()
            yield
    Pulse.phase = hangs
"""
IN_SETUP = """
import os, time
from pathlib import Path
from trainer.running import built
opened = built._opened
def for_ever():
    Path({folder!r}, "hangs").touch()
    time.sleep(1000)
def hangs(*arguments):
    if os.environ["RANK"] == "{rank}":
        for_ever()
    return opened(*arguments)
built._opened = hangs
"""
IN_COLLECTIVE = """
import os, time
from pathlib import Path
import torch.distributed as dist
reduce, taken = dist.all_reduce, [0]
def for_ever():
    Path({folder!r}, "hangs").touch()
    time.sleep(1000)
def hangs(*arguments, **named):
    from trainer.pulse import PULSE
    if os.environ["RANK"] == "{rank}" and PULSE.read().phase == "step":
        taken[0] += 1
        if taken[0] == 6:
            for_ever()
    return reduce(*arguments, **named)
dist.all_reduce = hangs
"""


def hung(path: Path, script: str, *, phase: str, rank: int, times: int = 1, beside: bool) -> float:
    """Seconds between a hang and the end of all ranks; it is named, and all stacks are there."""
    folder = path.parent
    (folder / "hangs").unlink(missing_ok=True)
    for old in (folder / "run/stacks").glob("*"):
        old.unlink()
    script = script.format(folder=str(folder), phase=phase, rank=rank, times=times)
    keys = [key.format(beside=str(beside).lower()) for key in KEYS]
    with Ranks(path, 2, *keys, script=script) as ranks:
        said = [ranks.said(each, seconds=600.0) for each in range(2)]
        ended = time.time()
    assert f"error: rank {rank} on {HOST} has got no further for " in said[0], said[0]
    assert f"s, in {phase}" in said[0], said[0]
    assert "error" not in said[1]
    assert [ranks.code(each) for each in range(2)] == [3, 3]
    for each in range(2):
        text = (folder / f"run/stacks/rank-0000{each}.txt").read_text()
        assert ("for_ever" in text) == (each == rank)
        assert "Thread" in text
    return ended - (folder / "hangs").stat().st_mtime


def test_a_disk_that_hangs_beside_training_is_named_by_the_rank_that_waits_for_it(tmp_path):
    """The others hang too, in the collective that follows; and nobody's main thread saves."""
    path = run_file(tmp_path, steps=400)
    hung(path, HANGS, phase="save", rank=1, times=2, beside=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hang_in_each_phase_is_named_and_the_run_comes_to_what_it_would_have(tmp_path):
    path = run_file(tmp_path, steps=12)
    text = path.read_text().replace("target: name}", "target: name, every: 4 steps}")
    path.write_text(text)
    took = {"setup": hung(path, IN_SETUP, phase="setup", rank=1, beside=True)}
    for phase, rank, times, beside in (
        ("building the model", 0, 1, True),
        ("episode", 1, 1, True),
        ("data", 1, 5, True),
        ("step", 0, 2, True),
        ("save", 0, 4, True),
        ("restore", 1, 1, True),
        ("save", 1, 2, False),
        ("evaluation names", 1, 1, True),
    ):
        name = f"{phase}, rank {rank}, {'beside' if beside else 'waiting'}"
        took[name] = hung(path, HANGS, phase=phase, rank=rank, times=times, beside=beside)
    took["collective"] = hung(path, IN_COLLECTIVE, phase="step", rank=1, beside=True)
    print({name: round(seconds, 1) for name, seconds in took.items()})
    assert max(took.values()) < 90.0, took
    keys = ("save_every=2 steps", "hang_seconds=300")
    with Ranks(path, 2, *keys) as ranks:
        said = ranks.said(0, seconds=600.0)
    assert ranks.code(0) == 0, said
    assert "going on from step" in said
    with Ranks(path, 2, *keys, f"workdir={tmp_path}/whole") as ranks:
        said = ranks.said(0, seconds=600.0)
    assert ranks.code(0) == 0, said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
