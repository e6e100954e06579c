"""What this process does now, and whether it gets on: read by a watch, written by everybody.

A beat is a sign of progress (a micro-batch, a pass over data, a tensor of a checkpoint), not of
life: a process that waits for others for ever beats no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Reading(NamedTuple):
    """A look at a process."""

    marks: int
    """Places in the program that all ranks pass, so far: who has fewest is behind."""
    phase: str
    seconds: float
    """Since the last of them."""
    usual: float
    """The longest time between two of them in this phase so far; 0 before there was one."""


class Pulse:
    """Knows the last beat; its phase is the innermost that was entered."""

    def __init__(self) -> None:
        self._marks, self._beside, self._at = 0, 0, time.monotonic()
        self._phases = ["setup"]
        self._longest: dict[str, float] = {}

    def beat(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # nobody waits for what is done beside
        now, phase = time.monotonic(), self._phases[-1]
        self._longest[phase] = max(self._longest.get(phase, 0.0), now - self._at)
        self._at = now

    def mark(self) -> None:
        """A beat at a place that every rank passes equally often."""
        self._marks += 1
        self.beat()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, this is what goes on; entering and leaving are marks. Beside the main thread they
        are nothing else: when at last somebody waits for that thread, who is behind has fewer."""
        if threading.current_thread() is not threading.main_thread():
            self._beside += 1
            yield
            self._beside += 1
            return
        self.mark()
        self._phases.append(name)
        try:
            yield
        finally:
            self.mark()
            self._phases.remove(name)

    def read(self) -> Reading:
        phase = self._phases[-1]
        waited = time.monotonic() - self._at
        return Reading(self._marks + self._beside, phase, waited, self._longest.get(phase, 0.0))


PULSE = Pulse()
"""That of this process. A process has one main thread, so one place where it can hang."""
