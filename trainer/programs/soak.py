"""Random faults against a real run; what it leaves must be the bytes of a run without them."""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, load_run
from trainer.errors import CheckpointError, TrainerError
from trainer.programs.faults import (
    Fault,
    Ranks,
    befalls,
    drawn,
    full_disk,
    happens,
    is_small,
    written,
)
from trainer.running.spikes import LEFT_OUT

HANG_SECONDS = 20.0
PATIENCE_SECONDS = 2 * HANG_SECONDS
LEFT = ("weights", "moments", "parts")
PHASES = ("building", "restore", "data", "step", "save")


class Report(NamedTuple):
    """What was tried, and whether anything was lost."""

    tried: Counter[str]
    rounds: int
    starts: int
    minutes: float
    ends_by_code: Counter[str]

    def __str__(self) -> str:
        lines = [f"{count:4d}  {name}" for name, count in sorted(self.tried.items())]
        codes = ", ".join(f"{name} {count}" for name, count in sorted(self.ends_by_code.items()))
        return "\n".join(
            [
                *lines,
                f"{sum(self.tried.values())} faults over {self.starts} starts of {self.rounds} "
                f"runs in {self.minutes:.1f} minutes; ends by code: {codes}; the last weights, "
                "moments, parts and logged losses of each are the bytes of a run without faults",
            ]
        )


class Soak:
    """Starts runs again and again until the time is over; the last one is brought to its end."""

    def __init__(
        self, run: str, overrides: Sequence[str], out: Path, *, ranks: int, seed: int
    ) -> None:
        self._run, self._out, self._ranks = run, out, ranks
        self._keys = [*overrides, f"hang_seconds={HANG_SECONDS}", "log_every=1 steps"]
        self._config = load_run(run, self._keys)
        self._draw = random.Random(seed)
        self.tried, self.codes, self.starts = Counter[str](), Counter[str](), 0
        out.mkdir(parents=True, exist_ok=True)

    def course(self, until: float) -> None:
        """One run to its end, with faults until the time; then the same without any."""
        for name in ("whole", "faults"):
            shutil.rmtree(self._out / name, ignore_errors=True)
        workdir = self._out / "faults"
        workdir.mkdir()
        while not self._start(workdir, faults=time.monotonic() < until):
            pass
        self._refuse_other_bytes(workdir, self._whole(workdir))

    def _start(self, workdir: Path, *, faults: bool) -> bool:
        """Whether the run has come to its end."""
        self.starts += 1
        fault = Fault("", "", 1, "", "")
        if faults:
            fault = drawn(self._draw, phases_of(self._config), small_disk=is_small(self._out))
        told, ballast = self._out / "told", threading.Timer(0.0, lambda: None)
        told.unlink(missing_ok=True)
        if fault.before:
            self.tried[fault.before] += befalls(fault.before, workdir, self._draw)
        slow = self._draw.uniform(0.3, 1.0) if fault.during == "a slow disk" else 0.0
        self.tried["a slow disk"] += bool(slow)
        command = self._command(workdir, fault, told, slow)
        log = self._out / "faults.log"
        ranks = Ranks(command, self._ranks, log, launcher="launcher" in fault.end)
        if fault.during == "a full disk":
            ballast = threading.Timer(self._draw.uniform(8.0, 25.0), self._fill_up)
            self.tried["a full disk"] += 1
        ballast.start()
        if faults and happens(fault, ranks, told, self._draw):
            self.tried[next(fault.names())] += 1
        codes = ranks.end(seconds=3600.0, patience=PATIENCE_SECONDS)
        ballast.join()
        self.codes.update(str(code) for code in codes)
        with (self._out / "starts.jsonl").open("a") as file:
            file.write(json.dumps([*fault, codes, _last_step(workdir)]) + "\n")
        if "launcher" not in fault.end and (1 in codes or 2 in codes):
            raise TrainerError(f"a start with {fault} ended with {codes}; see {log}")
        return not any(codes) and _last_step(workdir) == self._config.steps

    def _fill_up(self) -> None:
        with full_disk(self._out):
            time.sleep(6.0)

    def _command(self, workdir: Path, fault: Fault, told: Path, slow: float) -> list[str]:
        troubles: dict[str, Any] = {"sync_seconds": slow, "jumps": self._jumps()}
        if fault.phase:
            troubles |= {"phase": fault.phase, "times": fault.times, "told": str(told)}
        path = written(self._out / "troubles.json", **troubles)
        words = [sys.executable, "-m", "trainer.programs.struck", path, self._run, *self._keys]
        return [str(word) for word in [*words, f"workdir={workdir}"]]

    def _jumps(self) -> tuple[int, int] | None:
        """Where a run watches for spikes there is one, in the middle."""
        if self._config.spikes is None:
            return None
        first = self._config.global_batch * (self._config.steps // 2)
        return first, first + self._config.global_batch

    def _whole(self, faults: Path) -> Path:
        """The run without faults, which leaves out what the other one has."""
        whole = self._out / "whole"
        whole.mkdir()
        if (faults / LEFT_OUT).exists():
            shutil.copy(faults / LEFT_OUT, whole / LEFT_OUT)
        command = self._command(whole, Fault("", "", 1, "", ""), self._out / "told", 0.0)
        ranks = Ranks(command, self._ranks, self._out / "whole.log")
        codes = ranks.end(seconds=36000.0, patience=PATIENCE_SECONDS)
        if any(codes):
            raise TrainerError(f"the run without faults ended with {codes}")
        return whole

    def _refuse_other_bytes(self, faults: Path, whole: Path) -> None:
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
        if _losses(whole) != _losses(faults):
            raise CheckpointError("the two runs have not logged the same losses, once each")


def soak(
    run: str, overrides: Sequence[str], out: Path, *, minutes: float, ranks: int, seed: int
) -> Report:
    """A TrainerError where a fault has changed what the run comes to."""
    tried = Soak(run, overrides, out, ranks=ranks, seed=seed)
    began, rounds = time.monotonic(), 0
    while not rounds or time.monotonic() - began < 60.0 * minutes:
        tried.course(began + 60.0 * minutes)
        rounds += 1
    took = (time.monotonic() - began) / 60
    return Report(+tried.tried, rounds, tried.starts, took, tried.codes)


def phases_of(config: RunConfig) -> list[str]:
    """The phases that a start of this run passes."""
    more = ["episode"] if hasattr(config.recipe, "episode_samples") else []
    more += ["evaluation"] if config.evals else []
    more += ["going"] if config.spikes is not None else []
    return [*PHASES, *more]


def _last_step(workdir: Path) -> int:
    restored = Checkpointer(workdir / "checkpoints", Comm.solo()).latest(warn=lambda line: None)
    return restored.step if restored else 0


def _losses(workdir: Path) -> list[tuple[int, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["values"]["loss"]) for line in map(json.loads, lines)]
