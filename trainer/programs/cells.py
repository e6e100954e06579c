"""Trainings that a program starts one by one, each in a process of its own, and stops together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType
from typing import Any

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import parse_run
from trainer.running.looks import owed_looks
from trainer.stop import SIGNALS


class Cells:
    """Starts trainings, from any thread. What asks the program to stop (a signal, or `minutes`
    that are over) is passed on to those that run, which save and end; no other is started then."""

    def __init__(self, *, minutes: float | None = None) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._previous: dict[signal.Signals, Any] = {}
        self._timer = None if minutes is None else threading.Timer(60 * minutes, self.stop)

    def __enter__(self) -> Cells:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopped = True
        for process in tuple(self._running):
            process.send_signal(signal.SIGTERM)

    def run(
        self,
        command: Sequence[str],
        workdir: Path,
        name: str,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run a training whose output goes to `output.log` in its workdir; why it failed, or
        nothing.

        What was begun goes on from its newest checkpoint, and what is finished ends at once.
        `environment` is what it has besides this process's own.
        """
        workdir.mkdir(parents=True, exist_ok=True)
        if self.stopped:
            return ""
        with (workdir / "output.log").open("a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )
        self._running.add(process)
        if self.stopped:  # asked in between
            process.send_signal(signal.SIGTERM)
        status = process.wait()
        self._running.discard(process)
        if status == 0 or self.stopped:
            return ""
        return f"{name} (exit {status}): {workdir}/output.log"


def is_finished(workdir: Path) -> bool:
    """Whether a run has taken all of its steps and made the evaluations that its end asks for."""
    solo = Comm.solo()
    restored = Checkpointer(workdir / "checkpoints", solo, reads=("weights", "parts")).latest()
    if restored is None:
        return False
    config = parse_run(restored.texts["run.yaml"])
    return restored.step >= config.steps and not owed_looks(config, restored, solo)
