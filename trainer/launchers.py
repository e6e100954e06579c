"""The processes that started this one: `deepspeed`, `torchrun`, `accelerate`, an ssh session, or a
sweep of many trainings.

A launcher that dies may leave its ranks behind: `deepspeed`'s runner ends of a SIGTERM without a
word to them. So every rank looks now and then whether its launchers are still there. Where there is
no /proc, nothing is known and nothing is missed.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ConfigError

_LAUNCHER = re.compile(
    r"deepspeed|torchrun|torch\.distributed\.(run|launch)|accelerate|^sshd.*@notty"
    r"|tools/(scaling|compare)\.py"
)


class Process(NamedTuple):
    pid: int
    started: str
    """Clock ticks since the machine's start: another process of the same number has others."""
    command: tuple[str, ...]


def ancestors() -> list[Process]:
    """Parent, grandparent and so on, as far as they can be seen."""
    found, pid = [], os.getppid()
    while pid > 1 and (read := _read(pid)) is not None:
        process, pid = read
        found.append(process)
    return found


class Launchers:
    """The launchers above this process, remembered when it begins."""

    def __init__(self, *, look_every_seconds: float = 0.2) -> None:
        above = ancestors()
        last = max((n for n, process in enumerate(above) if _launches(process)), default=-1)
        self._watched = above[: last + 1]
        self._every, self._looked_at, self._gone = look_every_seconds, 0.0, ""

    def gone(self) -> str:
        """The name of a launcher that has ended since; empty while all are there."""
        now = time.monotonic()
        if not self._gone and now - self._looked_at >= self._every:
            self._looked_at = now
            ended = [process for process in self._watched if not _alive(process)]
            self._gone = Path(ended[0].command[0]).name if ended else ""
        return self._gone


def refuse_missing_hostfile() -> None:
    """A ConfigError where `deepspeed` was given a hostfile that does not exist: it would train on
    this machine alone and say so in a log line only."""
    for process in ancestors():
        hostfile = _option(process.command, "-H", "--hostfile")
        if hostfile is None or not _launches(process):
            continue
        folder = _link(process.pid, "cwd")
        if folder is not None and not (folder / hostfile).is_file():
            raise ConfigError(
                f"deepspeed was given the hostfile {hostfile}, and there is no such file in "
                f"{folder}; it would have trained on this machine alone"
            )


def _launches(process: Process) -> bool:
    return bool(_LAUNCHER.search(" ".join(process.command)))


def _option(command: tuple[str, ...], *names: str) -> str | None:
    for number, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name in names and (equals or number + 1 < len(command)):
            return value if equals else command[number + 1]
    return None


def _read(pid: int) -> tuple[Process, int] | None:
    """The process and its parent's number; None where it can't be seen."""
    try:
        # The name in parentheses may hold anything, so fields are counted behind the last one.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return Process(pid, fields[19], tuple(command.rstrip("\0").split("\0"))), int(fields[1])


def _alive(process: Process) -> bool:
    read = _read(process.pid)
    return read is not None and read[0].started == process.started and read[0].command != ("",)


def _link(pid: int, name: str) -> Path | None:
    try:
        return Path(f"/proc/{pid}/{name}").readlink()
    except OSError:
        return None
