"""A real run of several ranks, each a process that a launcher of its own might have started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.fixtures.emoji import write_shards
from tests.test_launch import RUN, free_port

ROOT = Path(__file__).parents[2]


BEGIN = """
from trainer.__main__ import main
from trainer.command import run_command
run_command(main)
"""


class Ranks:
    """Started at once; killed at the end of the block."""

    def __init__(self, path: Path, world_size: int, *overrides: str, script: str = "") -> None:
        """`script` runs in each rank before the program begins."""
        begin = ["-c", f"{script}\n{BEGIN}"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, *(begin if script else ["-m", "trainer"]), str(path), *overrides],
                cwd=ROOT,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world_size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def said(self, rank: int, *, seconds: float = 500.0) -> str:
        """All that a rank has said, once it has ended."""
        return self.processes[rank].communicate(timeout=seconds)[0]

    def code(self, rank: int) -> int | None:
        return self.processes[rank].returncode


def run_file(folder: Path, *, steps: int) -> Path:
    spec = write_shards(folder / "shards", count=32, per_shard=16)
    path = folder / "run.yaml"
    text = RUN.format(workdir=folder / "run", spec=spec)
    path.write_text(text.replace("steps: 4\n", f"steps: {steps}\n"))
    return path


def until_logged(workdir: Path, lines: int, *, seconds: float = 400.0) -> None:
    """Wait until a run has logged so many steps."""
    end, path = time.monotonic() + seconds, workdir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.1)
