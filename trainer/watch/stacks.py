"""Stacks of the threads of this process, and of one that can't write its own."""

from __future__ import annotations

import faulthandler
import shutil
import signal
import subprocess
import time
from pathlib import Path

from trainer.pulse import PULSE


def write_stacks(path: Path, who: str) -> None:
    """Behind those of earlier times in the file, under a line that says what went on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reading, now = PULSE.read(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with path.open("a") as file:
        file.write(f"\n{now} {who}, in {reading.phase} for {reading.seconds:.1f} s\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def dump_on_request() -> None:
    """`kill -USR2` writes the stacks of all threads to standard error."""
    if hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2, all_threads=True)


def dump_another(pid: int, path: Path) -> None:
    """The stacks of a process that stands still, where py-spy is installed and may look."""
    if (program := shutil.which("py-spy")) is None:
        return
    command = [program, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return
    path.write_text(done.stdout or done.stderr)
