"""Two recipes of one study: does the exponent differ, or the offset, and do their curves cross?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.scaling.fit import Law
from trainer.scaling.points import Point, Points, columns

Array = NDArray[np.float64]
_STEPS = 257
"""Places in compute at which the sign of the difference is looked at."""


class Difference(NamedTuple):
    """Something of the second law less the same of the first, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


class Comparison(NamedTuple):
    exponent: Difference
    """Of the exponents of compute."""
    offset: Difference
    """Of log10 error at the middle of the common range, where exponents hardly matter."""
    middle: float
    """That compute."""
    crossover: float | None
    """Compute at which the two curves cross; None where they do not within the common range."""
    crossover_interval: tuple[float, float] | None
    """None where fewer than 95 % of the draws cross in the range."""
    share_that_cross: float
    """Of the draws."""
    within: tuple[float, float]
    """The compute that both were run at."""


def compared(first: Law, second: Law) -> Comparison:
    """How `second` differs from `first`; runs of the two are drawn independently.

    ConfigError where they are no curves of one thing, or have no compute in common.
    """
    _refuse_other_things(first, second)
    within = _common(first.points, second.points)
    grid = np.geomspace(*within, _STEPS)
    middle = float(np.sqrt(within[0] * within[1]))
    gap, gaps = _gap(first, second, grid)
    place = _STEPS // 2
    crossing = _crossing(gap[None], grid)[0]
    crossings = _crossing(gaps, grid)
    found = crossings[np.isfinite(crossings)]
    share = len(found) / max(len(crossings), 1)
    narrow = min((first, second), key=lambda law: float(law.weight.sum()))
    limits = narrow.interval(np.log(found)) if share >= 0.95 else None
    return Comparison(
        exponent=_difference(narrow, *_exponents(first, second)),
        offset=_difference(narrow, float(gap[place]), gaps[:, place]),
        middle=middle,
        crossover=float(crossing) if np.isfinite(crossing) else None,
        crossover_interval=None if limits is None else (np.exp(limits[0]), np.exp(limits[1])),
        share_that_cross=share,
        within=within,
    )


def _difference(law: Law, value: float, drawn: Array) -> Difference:
    return Difference(value, *law.interval(drawn))


def _exponents(first: Law, second: Law) -> tuple[float, Array]:
    value = second.numbers["alpha"] - first.numbers["alpha"]
    place = first.form.numbers.index("alpha")
    each = [law.form.reported(law.draws, law.middle)[:, place] for law in (first, second)]
    length = min(map(len, each))
    return value, each[1][:length] - each[0][:length]


def _gap(first: Law, second: Law, grid: Array) -> tuple[Array, Array]:
    """log10 error of the second less that of the first, over the grid; the same of the draws."""
    at = columns([Point(run="", error=1.0, compute=float(compute)) for compute in grid])
    ones, many = zip(*(law.predicted(at) for law in (first, second)), strict=True)
    length = min(map(len, many))
    each = np.log10(many[1][:length]) - np.log10(many[0][:length])
    return np.log10(ones[1]) - np.log10(ones[0]), each


def _crossing(gap: Array, grid: Array) -> Array:
    """Where each row changes its sign first, between two places in a line; NaN where nowhere."""
    changes = np.signbit(gap[:, 1:]) != np.signbit(gap[:, :-1])
    place = changes.argmax(axis=1)
    rows = np.arange(len(gap))
    left, right = gap[rows, place], gap[rows, place + 1]
    part = np.clip(left / np.where(left == right, 1.0, left - right), 0, 1)
    where = np.log(grid[place]) + part * (np.log(grid[place + 1]) - np.log(grid[place]))
    return np.where(changes.any(axis=1), np.exp(where), np.nan)


def _common(first: Points, second: Points) -> tuple[float, float]:
    low = max(float(points.compute.min()) for points in (first, second))
    high = min(float(points.compute.max()) for points in (first, second))
    if low >= high:
        raise ConfigError(
            f"the two recipes have no compute in common (one starts at {low:.3g}, the other ends "
            f"at {high:.3g}); run both over one range"
        )
    return low, high


def _refuse_other_things(first: Law, second: Law) -> None:
    if first.form != second.form or "alpha" not in first.form.numbers:
        raise ConfigError(
            f"laws {first.form.name!r} and {second.form.name!r} have no exponent of compute in "
            "common; compare two fits of one law in compute (power, floor or shifted)"
        )
    for column in ("corpus", "schedule", "metric"):
        names = [getattr(law.points.rows[0], column) for law in (first, second)]
        if names[0] != names[1]:
            raise ConfigError(
                f"the two curves differ in {column} ({names[0]!r} and {names[1]!r}), so no "
                "difference is the recipe's; run both alike"
            )
