"""Random faults against a real run; its last weights must be those of a run without them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import load_run
from trainer.errors import CheckpointError, TrainerError
from trainer.log.environment import ROOT

FAULTS = ("kill", "kill all", "stand still", "ask to stop", "damage", "kill while saving")
HANG_SECONDS = 20.0
LEFT = ("weights", "moments", "parts")


class Report(NamedTuple):
    """What was tried, and whether anything was lost."""

    tried: Counter[str]
    starts: int
    minutes: float
    ends_by_code: Counter[str]

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {count}" for name, count in sorted(self.tried.items()))
        codes = ", ".join(f"{name} {count}" for name, count in sorted(self.ends_by_code.items()))
        return (
            f"{sum(self.tried.values())} faults ({tried}) over {self.starts} starts in "
            f"{self.minutes:.1f} minutes; ends by code: {codes}; the last weights, moments and "
            "parts are the bytes of the run without faults"
        )


class Ranks:
    """Processes of one start, as a launcher makes them."""

    def __init__(self, command: Sequence[str], count: int, log: Path) -> None:
        port = free_port()
        self._file = log.open("ab")
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                stdout=self._file,
                stderr=subprocess.STDOUT,
            )
            for rank in range(count)
        ]

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def end(self, *, seconds: float) -> list[int | None]:
        """Exit codes; who has not ended in time is killed and counts as None."""
        until = time.monotonic() + seconds
        while self.alive() and time.monotonic() < until:
            if any(process.poll() not in (None, 0) for process in self.processes):
                until = min(until, time.monotonic() + 2 * HANG_SECONDS)  # as a launcher does
            time.sleep(0.1)
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        self._file.close()
        return codes


def soak(
    run: str, overrides: Sequence[str], out: Path, *, minutes: float, ranks: int, seed: int
) -> Report:
    """A TrainerError where a fault has changed what the run comes to."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("whole", "faults"):
        shutil.rmtree(out / name, ignore_errors=True)
    keys = [*overrides, f"hang_seconds={HANG_SECONDS}", "save_every=2 steps", "evals=[]"]
    config = load_run(run, keys)

    def command(name: str, *more: str) -> list[str]:
        words = [sys.executable, "-m", "trainer", run, *keys, f"workdir={out / name}", *more]
        return [str(word) for word in words]

    whole = Ranks(command("whole"), ranks, out / "whole.log").end(seconds=36000.0)
    if any(whole):
        raise TrainerError(f"the run without faults ended with {whole}; see {out / 'whole.log'}")
    draw, tried, codes = random.Random(seed), Counter[str](), Counter[str]()
    began, starts = time.monotonic(), 0
    while True:
        starts += 1
        started = Ranks(command("faults"), ranks, out / "faults.log")
        if time.monotonic() - began < 60.0 * minutes:
            fault = draw.choice(FAULTS)
            tried[fault] += _happens(fault, started, out / "faults", draw)
        ended = started.end(seconds=3600.0)
        codes.update(str(code) for code in ended)
        if not any(ended) and _last_step(out / "faults") == config.steps:
            break
        if 1 in ended or 2 in ended:
            raise TrainerError(f"a start ended with {ended}; see {out / 'faults.log'}")
    _refuse_other_bytes(out / "whole", out / "faults")
    return Report(tried, starts, (time.monotonic() - began) / 60, codes)


def _happens(fault: str, ranks: Ranks, workdir: Path, draw: random.Random) -> bool:
    """Let a fault happen at a random moment; False where the run has ended before."""
    if fault == "damage":
        return _damage(workdir, draw)
    saving = fault == "kill while saving"
    until = time.monotonic() + draw.uniform(5.0, 40.0)
    while ranks.alive() and (not _saving(workdir) if saving else time.monotonic() < until):
        time.sleep(0.005)
    if not ranks.alive():
        return False
    number = {"stand still": signal.SIGSTOP, "ask to stop": signal.SIGTERM}
    everybody = fault in ("kill all", "ask to stop")
    chosen = ranks.processes if everybody else [draw.choice(ranks.processes)]
    for process in chosen:
        process.send_signal(number.get(fault, signal.SIGKILL))
    return True


def _saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob(".saving-*"))


def _damage(workdir: Path, draw: random.Random) -> bool:
    """Turn a bit in the newest of several checkpoints; the one before is then gone on from."""
    found = sorted((workdir / "checkpoints").glob("step-*"))
    if len(found) < 2:
        return False
    try:
        path = draw.choice(sorted(found[-1].glob("*.safetensors")))
        with path.open("r+b") as file:
            place = draw.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    except OSError:
        return False  # it went meanwhile
    return True


def _last_step(workdir: Path) -> int:
    restored = Checkpointer(workdir / "checkpoints", Comm.solo()).latest()
    return restored.step if restored else 0


def _refuse_other_bytes(whole: Path, faults: Path) -> None:
    first, second = (
        Checkpointer(folder / "checkpoints", Comm.solo()).latest() for folder in (whole, faults)
    )
    if first is None or second is None or first.step != second.step:
        raise CheckpointError("the two runs do not end at the same step")
    for group in LEFT:
        ours, theirs = (dict(r.tensors(group)) for r in (first, second))
        other = [name for name in ours if not ours[name].equal(theirs[name])]
        if other or ours.keys() != theirs.keys():
            raise CheckpointError(f"{len(other)} tensors of {group} differ, as {other[:1]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
