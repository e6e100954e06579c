"""What size is best at equal compute: error over weights along lines of one budget of FLOPs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.scaling.points import Array, Point, Points

LEAST_MODELS = 3
"""A parabola has three numbers."""


class Level(NamedTuple):
    """Models at one compute; their errors lie between those of their own trainings."""

    compute: float
    parameters: Array
    error: Array
    best: float | None
    """Weights at the minimum of a parabola in log weights and log error; None where it has none
    between the smallest model and the largest."""


def levels(points: Points, *, count: int = 5) -> list[Level]:
    """Lines of equal compute, evenly apart in its logarithm, that three models at least cover.

    A model's error at a compute is interpolated in a straight line on log axes between its own
    trainings, means over seeds, on the data that did best there; nothing is extrapolated.
    """
    ladder = _ladder(points.rows)
    tried = np.geomspace(points.compute.min(), points.compute.max(), 400)
    covered = [c for c in tried if sum(x[0] <= c <= x[-1] for x, _ in ladder.values()) >= 3]
    if not covered or covered[0] == covered[-1]:
        return []
    return [_level(c, ladder) for c in np.geomspace(covered[0], covered[-1], count)]


def growth(found: Sequence[Level]) -> float | None:
    """The exponent a of best weights = k C^a, by least squares on log axes; None below two."""
    minima = [(level.compute, level.best) for level in found if level.best is not None]
    if len(minima) < 2:
        return None
    compute, best = np.log(np.array(minima)).T
    return float(np.polyfit(compute, best, 1)[0])


def _ladder(rows: Sequence[Point]) -> dict[float, tuple[Array, Array]]:
    """(compute, error) of each size, at two budgets at least, by its weights."""
    runs: dict[tuple[float, float, float], list[float]] = defaultdict(list)
    for row in rows:
        runs[row.parameters, row.compute, row.unique_samples].append(np.log(row.error))
    means: dict[float, dict[float, float]] = defaultdict(dict)
    for (parameters, compute, _), errors in runs.items():
        mean = float(np.mean(errors))
        means[parameters][compute] = min(mean, means[parameters].get(compute, np.inf))
    return {
        parameters: (np.array(sorted(own)), np.array([own[c] for c in sorted(own)]))
        for parameters, own in means.items()
        if len(own) > 1 and np.isfinite(parameters)
    }


def _level(compute: float, ladder: dict[float, tuple[Array, Array]]) -> Level:
    there = {n: own for n, own in ladder.items() if own[0][0] <= compute <= own[0][-1]}
    sizes = sorted(there)
    errors = [np.interp(np.log(compute), np.log(there[n][0]), there[n][1]) for n in sizes]
    parameters, error = np.array(sizes), np.array(errors)
    best = None
    if len(sizes) >= LEAST_MODELS:
        curve, slope, _ = np.polyfit(np.log(parameters), error, 2)
        if curve > 0 and parameters[0] < np.exp(-slope / (2 * curve)) < parameters[-1]:
            best = float(np.exp(-slope / (2 * curve)))
    return Level(float(compute), parameters, np.exp(error), best)
