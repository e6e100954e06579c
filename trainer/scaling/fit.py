"""A law fitted to the runs of a study, with intervals over runs and over the choice of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from trainer.errors import DataError
from trainer.scaling.forms import Form, FormName, Inputs, inputs
from trainer.scaling.frontier import Frontier, chosen
from trainer.scaling.points import Points, one_curve
from trainer.scaling.robust import minimised

Array = NDArray[np.float64]
LEVEL = 0.95
DELTA = 1e-2
"""Of the Huber loss: log errors further off than this pull no harder."""
RESAMPLES = 1000
_EQUALLY_GOOD = 1e-9
_EXACT = 1e-24


class Law(NamedTuple):
    """A fitted law, and what it was fitted to."""

    form: Form
    frontier: Frontier
    delta: float
    points: Points
    weight: Float64[np.ndarray, " points"]
    """1 for the points that it was fitted to, else 0."""
    free: Float64[np.ndarray, " numbers"]
    draws: Float64[np.ndarray, "draws numbers"]
    """The same fit for each draw of the bootstrap, without those that have no answer."""
    num_lost: int
    """Draws with fewer points than the law has numbers."""
    middle: Float64[np.ndarray, " axes"]
    objective: float

    @property
    def numbers(self) -> dict[str, float]:
        found = self.form.reported(self.free[None], self.middle)[0]
        return dict(zip(self.form.numbers, found.tolist(), strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each number; NaN where fewer than half of the draws have an answer."""
        found = self.form.reported(self.draws, self.middle)
        limits = [self.interval(column) for column in found.T]
        return dict(zip(self.form.numbers, limits, strict=True))

    def interval(self, drawn: Float64[np.ndarray, " draws"]) -> tuple[float, float]:
        """The 95 % interval of something that each draw has a value of.

        Percentiles, further out where few points were fitted: those of Student's t of as many
        degrees of freedom as are left, not of the normal (arXiv 1411.5279).
        """
        from scipy import stats  # takes two seconds to import

        if len(drawn) <= self.num_lost or not len(drawn):
            return float("nan"), float("nan")
        count = max(float(self.weight.sum()), 2.0)
        left = max(count - len(self.free), 1.0)
        far = stats.t.ppf((1 + LEVEL) / 2, left) * np.sqrt(count / left)
        tail = float(stats.norm.cdf(-far))
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return float(low), float(high)

    def predicted(self, points: Points) -> tuple[Array, Array]:
        """The law's error at these points [points], and that of each draw [draws, points]."""
        x = inputs(points, self.middle)
        told = self.form.log_error(np.concatenate([self.free[None], self.draws]), x)[0]
        return np.exp(told[0]), np.exp(told[1:])


def fit(
    points: Points,
    form: FormName,
    *,
    frontier: Frontier = "all",
    delta: float = DELTA,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Law:
    """The law that comes nearest to one curve's points.

    ConfigError where the points are of several corpora, schedules, metrics or recipes; DataError
    where there are too few of them, or a column that the law reads is missing.
    """
    one_curve(points)
    law = Form(form)
    _refuse_what_is_missing(points, law)
    x, log_error = inputs(points), np.log(points.error)
    weight = chosen(np.ones((1, len(points))), points.compute, points.error, frontier=frontier)[0]
    _refuse_too_few(points, weight, law, frontier)
    free, objective, tried = _best(law, x, log_error, weight, delta)
    counts = _drawn(points, resamples, seed)
    drawn = chosen(counts, points.compute, points.error, frontier=frontier)
    enough = _distinct(points, drawn, law) > len(law.numbers)
    draws = _again(law, x, log_error, drawn[enough], tried, delta)
    return Law(
        *(law, frontier, delta, points, np.sign(weight), free, draws),
        num_lost=int((~enough).sum()),
        middle=x.middle,
        objective=objective,
    )


def _best(
    form: Form, x: Inputs, log_error: Array, weight: Array, delta: float
) -> tuple[Array, float, Array]:
    """The best of all starts, its objective, and what the bootstrap begins at."""
    starts = _with_no_floor(form, form.starts(log_error[weight > 0]))
    ends, heights = minimised(
        form, x, log_error, starts, np.tile(weight, (len(starts), 1)), delta=delta
    )
    order = np.argsort(heights).tolist()
    best = order[0]
    place = form.nested()
    if place is not None:
        bare = next(at for at in order if np.isneginf(ends[at, place]))
        if heights[bare] <= heights[best] * (1 + _EQUALLY_GOOD) + _EXACT:
            best = bare
        floored = next(at for at in order if np.isfinite(ends[at, place]))
        return ends[best], float(heights[best]), ends[[best, bare, floored]]
    return ends[best], float(heights[best]), ends[[best]]


def _with_no_floor(form: Form, starts: Array) -> Array:
    """The starts, and as many of the law whose floor is zero."""
    place = form.nested()
    if place is None:
        return starts
    bare = starts.copy()
    bare[:, place] = -np.inf
    return np.concatenate([starts, np.unique(bare, axis=0)])


def _again(
    form: Form, x: Inputs, log_error: Array, weight: Array, starts: Array, delta: float
) -> Array:
    """The best end of each draw from the few starts."""
    if not len(weight):
        return np.empty((0, starts.shape[1]))
    starts = np.unique(starts, axis=0)
    every = np.repeat(starts, len(weight), axis=0)
    ends, heights = minimised(
        form, x, log_error, every, np.tile(weight, (len(starts), 1)), delta=delta
    )
    best = heights.reshape(len(starts), -1).argmin(axis=0)
    found: Array = ends.reshape(len(starts), len(weight), -1)[best, np.arange(len(weight))]
    return found


def _drawn(points: Points, resamples: int, seed: int) -> Array:
    """How often each point is in each draw: runs are drawn, with all of their points."""
    draw = np.random.default_rng(seed)
    runs = int(points.group.max()) + 1
    drawn: NDArray[np.int64] = draw.multinomial(runs, np.full(runs, 1 / runs), size=resamples)[
        :, points.group
    ]
    return drawn.astype(np.float64)


def _distinct(points: Points, weight: Array, form: Form) -> NDArray[np.int64]:
    """Different places among each draw's points, along the column that has the fewest."""
    counts: list[NDArray[np.int64]] = []
    for name in form.reads[:2]:
        place = np.unique(getattr(points, name), return_inverse=True)[1]
        there = np.zeros((len(weight), int(place.max()) + 1))
        for column, at in enumerate(place):
            there[:, at] += weight[:, column]
        counts.append((there > 0).sum(axis=1))
    if len(form.reads) > 1:
        found: NDArray[np.int64] = (weight > 0).sum(axis=1)
        found[np.minimum(*counts) <= 1] = 0
        return found
    return counts[0]


def _refuse_what_is_missing(points: Points, form: Form) -> None:
    for name in form.reads:
        missing = int(np.isnan(getattr(points, name)).sum())
        if missing:
            raise DataError(
                f"{missing} of {len(points)} points say no {name}, which the law {form.name!r} "
                f"reads; add the column {name} to their table, or fit one in compute"
            )


def _refuse_too_few(points: Points, weight: Array, form: Form, frontier: Frontier) -> None:
    there = int(_distinct(points, weight[None], form)[0])
    if there <= len(form.numbers):
        raise DataError(
            f"{there} points at different {' and '.join(form.reads[:2])} are left of "
            f"{len(points)} by frontier {frontier!r}, and the law {form.name!r} has "
            f"{len(form.numbers)} numbers; fit it to frontier=all, take a law of fewer, or run "
            "more cells"
        )


class HeldOut(NamedTuple):
    """What a law says of points that cost more than those it was fitted to."""

    law: Law
    points: Points
    predicted: Float64[np.ndarray, " points"]
    low: Float64[np.ndarray, " points"]
    high: Float64[np.ndarray, " points"]
    decades_beyond: Float64[np.ndarray, " points"]
    """How far the point lies behind the last fitted one, in factors of ten of compute."""

    @property
    def relative_error(self) -> Array:
        found: Array = self.predicted / self.points.error - 1
        return found


def held_out(
    points: Points, form: FormName, *, decades: float = 1.0, **how: object
) -> HeldOut | None:
    """The law of all but the last `decades` of compute, beside what was measured there.

    Of the points there, those that the choice keeps. None where too few are left to fit to.
    """
    last = points.compute.max() / 10**decades
    try:
        law = fit(points.chosen(points.compute <= last), form, **how)  # type: ignore[arg-type]
    except DataError:
        return None
    keep = chosen(np.ones((1, len(points))), points.compute, points.error, frontier=law.frontier)[0]
    beyond = points.chosen((points.compute > last) & (keep > 0)) if keep.any() else points
    predicted, drawn = law.predicted(beyond)
    limits = np.array([law.interval(column) for column in drawn.T])
    reached = np.log10(beyond.compute / law.points.compute.max())
    return HeldOut(law, beyond, predicted, limits[:, 0], limits[:, 1], reached)


def as_json(law: Law) -> dict[str, object]:
    """The figures of a law, for a file."""
    intervals: Mapping[str, tuple[float, float]] = law.intervals
    return {
        "law": law.form.name,
        "frontier": law.frontier,
        "delta": law.delta,
        "points": len(law.points),
        "points_fitted": int(law.weight.sum()),
        "objective": law.objective,
        "numbers": law.numbers,
        "intervals": {name: list(limits) for name, limits in intervals.items()},
        "draws": len(law.draws),
        "draws_without_answer": law.num_lost,
    }
