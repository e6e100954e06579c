"""What may happen to a run of several ranks, drawn at random: how it ends, when, and what goes on
beside it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from trainer.log.environment import ROOT

ENDS = {
    "SIGKILL of a rank": signal.SIGKILL,
    "SIGKILL of all ranks": signal.SIGKILL,
    "SIGKILL of the launcher": signal.SIGKILL,
    "SIGSTOP of a rank": signal.SIGSTOP,
    "SIGTERM of all ranks": signal.SIGTERM,
    "SIGTERM of a rank": signal.SIGTERM,
}
BEFORE = ("a bit turned", "a file cut", "a file gone", "a torn line")
DURING = ("a full disk", "a slow disk")
SMALL_DISK_BYTES = 1 << 30
"""A disk of at most so many bytes may be filled up: it is there for the soak."""


class Fault(NamedTuple):
    """What ends a start, and when."""

    end: str
    phase: str
    """Where it happens; at a random time where empty."""
    times: int
    """In which entry of the phase."""
    before: str
    during: str

    def names(self) -> Iterator[str]:
        yield f"{self.end} in {self.phase}" if self.phase else self.end
        yield from filter(None, (self.before, self.during))


def drawn(draw: random.Random, phases: Sequence[str], *, small_disk: bool) -> Fault:
    phase = draw.choice(("", *phases))
    rarely = ("restore", "building", "episode", "evaluation", "going")
    times = 1 if phase in rarely else draw.randint(1, 8)
    during = DURING if small_disk else DURING[1:]
    return Fault(
        draw.choice(list(ENDS)),
        phase,
        times,
        draw.choice(BEFORE) if draw.random() < 0.4 else "",
        draw.choice(during) if draw.random() < 0.3 else "",
    )


class Ranks:
    """Processes of one start, as a launcher makes them; a `launcher` is torchrun itself."""

    def __init__(
        self, command: Sequence[str], count: int, log: Path, *, launcher: bool = False
    ) -> None:
        port = free_port()
        self._file = log.open("ab")
        self._launched = launcher
        if launcher:
            words = ["--nproc_per_node", str(count), "--master_port", str(port)]
            begin = [sys.executable, "-m", "torch.distributed.run", *words]
            self.processes = [self._started([*begin, *command[1:]], {})]
            return
        self.processes = [
            self._started(
                command,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(count)
        ]

    def _started(self, command: Sequence[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **more},
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    def pids(self) -> list[int]:
        """Of the ranks."""
        if not self._launched:
            return [process.pid for process in self.processes if process.poll() is None]
        pid = self.processes[0].pid
        with suppress(OSError):
            path = Path(f"/proc/{pid}/task/{pid}/children")
            return [int(word) for word in path.read_text().split()]
        return []

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def end(self, *, seconds: float, patience: float) -> list[int | None]:
        """Exit codes; who has not ended in time is killed and counts as None. Once one has ended
        badly the others have `patience` seconds, as with a launcher."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            if any(process.poll() not in (None, 0) for process in self.processes):
                until = min(until, time.monotonic() + patience)
            time.sleep(0.1)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        self._file.close()
        return codes


def happens(fault: Fault, ranks: Ranks, told: Path, draw: random.Random) -> bool:
    """Wait for the moment and let it happen; False where the run has ended before."""
    until = time.monotonic() + draw.uniform(5.0, 40.0)
    while ranks.alive() and (not told.exists() if fault.phase else time.monotonic() < until):
        time.sleep(0.003)
    pids = ranks.pids()
    if not ranks.alive() or not pids:
        return False
    time.sleep(draw.choice((0.0, 0.0, draw.uniform(0.0, 0.5))))
    chosen = pids if "all ranks" in fault.end else [draw.choice(pids)]
    if "launcher" in fault.end:
        chosen = [ranks.processes[0].pid]
    for pid in chosen:
        with suppress(ProcessLookupError):
            os.kill(pid, ENDS[fault.end])
    if "launcher" in fault.end:
        _until_gone(pids)
    return True


def _until_gone(pids: Sequence[int]) -> None:
    """Ranks notice by themselves that their launcher is gone."""
    end = time.monotonic() + 120.0
    while any(map(_runs, pids)):
        if time.monotonic() > end:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise RuntimeError("ranks outlived their launcher by 120 s")
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def befalls(what: str, workdir: Path, draw: random.Random) -> bool:
    """Between two starts: a checkpoint that a disk has changed, or a line that was half written."""
    if what == "a torn line":
        path = workdir / draw.choice(("metrics.jsonl", "events.jsonl"))
        if path.exists():
            with path.open("ab") as file:
                file.write(b'{"step": 7, "samp')
        return path.exists()
    found = sorted((workdir / "checkpoints").glob("step-*"))
    if len(found) < 2:  # the one before is gone on from
        return False
    path = draw.choice(sorted(found[-1].iterdir()))
    _changed(path, what, draw)
    return True


def _changed(path: Path, what: str, draw: random.Random) -> None:
    if what == "a file gone":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if what == "a file cut":
        content = content[:place]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def is_small(folder: Path) -> bool:
    """Whether a folder's disk may be filled up."""
    return shutil.disk_usage(folder).total <= SMALL_DISK_BYTES


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Within it no byte is free where the folder is."""
    path = folder / "ballast"
    try:
        with path.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        yield
    finally:
        path.unlink(missing_ok=True)


def written(path: Path, **troubles: object) -> Path:
    path.write_text(json.dumps(troubles))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
