"""How a command line ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import atexit, sys
from trainer.command import run_command
from trainer.comm import Comm
from trainer.errors import DataError

class Late:
    def __del__(self):
        print("taken apart")

late = Late()
atexit.register(print, "at exit")

def main():
    {join}
    print("worked", end=" ")
    {end}

run_command(main)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("raise DataError('no labels')", 2), ("raise ValueError('ours')", 1)],
)
@pytest.mark.parametrize("join", ["Comm.from_environment()", "pass"])
def test_a_rank_ends_without_taking_its_interpreter_apart(join: str, end: str, code: int) -> None:
    """A thread of its group that lets go of a tensor while it is would abort a finished run."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(join=join, end=end)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    joined = join != "pass" and code != 1
    assert done.returncode == code, done.stderr
    assert done.stdout.split("\n") == ["worked at exit"] + [""] * joined + (
        [] if joined else ["taken apart", ""]
    )
    assert ("error: no labels" in done.stderr) == (code == 2)
    assert ("ValueError: ours" in done.stderr) == (code == 1)
