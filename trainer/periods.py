"""Is something due that happens every `1000 steps`, `2 epochs`, `30 min`?

Counts are exact and depend on nothing but the progress before and after a step, so a resumed run
does everything where the uninterrupted run does it. Minutes depend on a clock, and the clocks of
two ranks differ: there `due` is one rank's opinion, and `Clock` makes rank 0's the rule.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction

from trainer.comm import Comm
from trainer.config import Period
from trainer.errors import ConfigError
from trainer.types import Progress


def due(
    period: Period,
    before: Progress,
    after: Progress,
    *,
    epoch_size: int,
    seconds_since_last: float,
) -> bool:
    """Whether a multiple of the period lies in (before, after].

    `epoch_size` is in samples. `seconds_since_last` counts from the last time it was done (or the
    start of the process) and matters for minutes only.
    """
    if period.unit == "never":
        return False
    if not 0 < period.count < float("inf"):
        raise ConfigError(f"a period of {period} can't be kept; use a positive number, or 'never'")
    count = Fraction(repr(period.count))  # the decimal as written: 0.1 epochs of 1000 are 100
    if period.unit == "min":
        return Fraction(seconds_since_last) >= 60 * count
    if period.unit == "steps":
        return after.step // count > before.step // count
    samples = count * epoch_size if period.unit == "epochs" else count
    return after.samples // samples > before.samples // samples


class Clock:
    """Keeps, for each purpose, the time since it was last due; rank 0's clock is the rule."""

    def __init__(self, comm: Comm, *, epoch_size: int) -> None:
        self._comm = comm
        self._epoch_size = epoch_size
        self._started = time.monotonic()
        self._last: dict[str, float] = {}
        self._asked: dict[str, Callable[[], bool]] = {}

    def due(self, purpose: str, period: Period, before: Progress, after: Progress) -> bool:
        """As `due` above, equal on all ranks, which all call this once a step for each purpose.

        Minutes cost one tiny collective. Its result is read by the next call, a step later, so
        nobody waits.
        """
        if period.unit == "min" and self._answer(purpose):
            self._last[purpose] = time.monotonic()
            return True
        seconds = time.monotonic() - self._last.get(purpose, self._started)
        is_due = due(period, before, after, epoch_size=self._epoch_size, seconds_since_last=seconds)
        if period.unit != "min":
            return is_due
        self._asked[purpose] = self._comm.any_later(is_due and self._comm.is_main)
        return False

    def _answer(self, purpose: str) -> bool:
        asked = self._asked.pop(purpose, None)
        return asked is not None and asked()
