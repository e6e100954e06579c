"""Asked to stop: leave what is under way, save, exit.

A step of many micro-batches, an episode's clustering or an evaluation can take longer than a
launcher waits. So whatever takes long calls a `Check` that it was given, which raises `Stopped` on
all ranks at the same call; the loop puts back what was begun and saves.

SIGTERM (schedulers, launchers), SIGUSR1 (Slurm's warning before the time limit) and SIGINT (Ctrl-C)
ask; a second one exits at once. Launchers pass a signal on that the ranks have already got from the
terminal or the scheduler, so what arrives within two seconds of the first is the same request.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from trainer.comm import Comm
from trainer.launchers import Launchers
from trainer.pulse import PULSE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


Check = Callable[[], None]
"""Raises `Stopped` where the ranks have agreed to stop. All of them call it equally often."""


class Stopped(BaseException):
    """Every rank leaves what it is doing, at the same call of a `Check`.

    Not an `Exception`: what goes on after a failure must not go on after this.
    """


def go_on() -> None:
    """The `Check` of a caller whom nothing stops."""


class StopRequest:
    """Holds the signal handlers from construction (on the main thread) until `close`."""

    def __init__(self, *, same_request_seconds: float = 2.0) -> None:
        self._same_request_seconds = same_request_seconds
        self._received_at: float | None = None
        self._pending: Callable[[], bool] | None = None
        self._launchers = Launchers()
        self.signal_name: str | None = None
        """The first signal that this rank got."""
        self._previous: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._receive) for number in SIGNALS
        }

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def requested(self) -> bool:
        """Whether this rank got a signal, or lost the launcher that would have passed one on."""
        if self._received_at is None and (launcher := self._launchers.gone()):
            self._received_at, self.signal_name = time.monotonic(), f"end of {launcher}"
        return self._received_at is not None

    def agreed(self, comm: Comm) -> bool:
        """True on every rank, at the same call, once one of them had got a signal a call earlier.

        One tiny collective; every rank calls this equally often. It answers with the result of the
        call before, which has long arrived, so nobody waits.
        """
        answer, self._pending = self._pending, comm.any_later(self.requested)
        return answer is not None and answer()

    def check(self, comm: Comm) -> None:
        """`Stopped` on every rank where `agreed` is true. A mark of the pulse."""
        PULSE.mark()
        if self.agreed(comm):
            raise Stopped

    def close(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            self.signal_name = signal.Signals(number).name
        elif now - self._received_at >= self._same_request_seconds:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
