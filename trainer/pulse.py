"""What this process does now, and whether it gets on: read by a watch, written by everybody.

A beat is a sign of progress (a micro-batch, a pass over data, a tensor of a checkpoint), not of
life: a process that waits for others for ever beats no more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Reading(NamedTuple):
    """A look at a process."""

    beats: int
    """Signs of progress so far; ranks of one run give equally many between two collectives."""
    phase: str
    seconds: float
    """Since the last of them."""


class Pulse:
    """Counts beats; its phase is the innermost that was entered."""

    def __init__(self) -> None:
        self._beats, self._at = 0, time.monotonic()
        self._phases = ["setup"]

    def beat(self) -> None:
        self._beats, self._at = self._beats + 1, time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, this is what goes on; entering and leaving are beats."""
        self._phases.append(name)
        self.beat()
        try:
            yield
        finally:
            self._phases.remove(name)
            self.beat()

    def read(self) -> Reading:
        return Reading(self._beats, self._phases[-1], time.monotonic() - self._at)


PULSE = Pulse()
"""That of this process. A process has one main thread, so one place where it can hang."""
