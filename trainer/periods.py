"""Is something due that happens every `1000 steps`, `2 epochs`, `30 min`?

Counts are exact and depend on nothing but the progress before and after a step, so a resumed run
does everything where the uninterrupted run does it. Minutes depend on a clock, and the clocks of
two ranks differ: there `due` is one rank's opinion, and `due_on_all` makes rank 0's the rule.
"""

from __future__ import annotations

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


def due_on_all(
    period: Period,
    before: Progress,
    after: Progress,
    *,
    epoch_size: int,
    seconds_since_last: float,
    comm: Comm,
) -> bool:
    """As `due`, equal on all ranks. Only a period in minutes costs a collective."""
    answer = due(
        period, before, after, epoch_size=epoch_size, seconds_since_last=seconds_since_last
    )
    return comm.any(comm.is_main and answer) if period.unit == "min" else answer
