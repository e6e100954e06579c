"""Many fits of a law at once, least in the summed Huber loss of log errors.

A damped Gauss-Newton method on all starts and all draws of a bootstrap together. Of each step two
are tried: one that gives large residuals the weight delta / |r| (it comes near from anywhere), and
Newton's own, in which they have no curvature (it ends the way). The better one is taken.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from trainer.scaling.forms import Form, Inputs

Array = NDArray[np.float64]
_ITERATIONS = 400
_SETTLED = 1e-14
_MOST = 40.0
"""No free number of a law moves by more in one step; they are logarithms and exponents."""


def objective(
    residual: Float64[np.ndarray, "draws points"],
    weight: Float64[np.ndarray, "draws points"],
    *,
    delta: float,
) -> Float64[np.ndarray, " draws"]:
    """Sum of r^2 / 2 within delta and of delta (|r| - delta / 2) beyond, by weight."""
    size = np.abs(residual)
    inside = np.minimum(size, delta)
    return np.asarray((weight * inside * (size - inside / 2)).sum(axis=1))


def minimised(
    form: Form,
    x: Inputs,
    log_error: Float64[np.ndarray, " points"],
    free: Float64[np.ndarray, "draws numbers"],
    weight: Float64[np.ndarray, "draws points"],
    *,
    delta: float,
) -> tuple[Float64[np.ndarray, "draws numbers"], Float64[np.ndarray, " draws"]]:
    """The free numbers at which each draw's descent from `free` ends, and its objective there."""
    free = free.astype(np.float64).copy()
    value, slope = form.log_error(free, x)
    best = objective(value - log_error, weight, delta=delta)
    damping = np.full(len(free), 1e-3)
    live = np.arange(len(free))
    for _ in range(_ITERATIONS):
        residual = value[live] - log_error
        steps = _steps(residual, slope[live], weight[live], damping[live], delta=delta)
        moved, told, tilt, height = _better(
            form, x, log_error, free[live], steps, weight[live], delta=delta
        )
        gained = height < best[live]
        settled = best[live] - height <= _SETTLED * best[live]
        taken = live[gained]
        free[taken], value[taken], slope[taken] = moved[gained], told[gained], tilt[gained]
        best[taken] = height[gained]
        damping[live] = np.where(gained, damping[live] / 5, damping[live] * 8)
        live = live[~(settled & ~gained & (damping[live] > 1e8)) & (best[live] > 1e-30)]
        if not len(live):
            break
    return free, best


def _steps(
    residual: Array, slope: Array, weight: Array, damping: Array, *, delta: float
) -> list[Array]:
    size = np.maximum(np.abs(residual), 1e-300)
    pull = weight * np.clip(residual, -delta, delta)
    down = np.einsum("dn,dnp->dp", pull, slope)
    found = []
    for curvature in (np.minimum(1.0, delta / size), (size <= delta).astype(np.float64)):
        bend = np.einsum("dn,dnp,dnq->dpq", weight * curvature, slope, slope, optimize=True)
        scale = np.sqrt(np.einsum("dpp->dp", bend))
        scale[scale == 0] = 1.0
        even = bend / (scale[:, :, None] * scale[:, None, :])
        even = even + np.eye(bend.shape[1]) * np.maximum(damping, 1e-13)[:, None, None]
        step = -np.linalg.solve(even, (down / scale)[:, :, None])[:, :, 0] / scale
        found.append(np.clip(step, -_MOST, _MOST))
    return found


def _better(
    form: Form,
    x: Inputs,
    log_error: Array,
    free: Array,
    steps: list[Array],
    weight: Array,
    *,
    delta: float,
) -> tuple[Array, Array, Array, Array]:
    """Per draw the end of the step that leads lower: where, value, slope, height."""
    ends = []
    for step in steps:
        with np.errstate(over="ignore", invalid="ignore"):
            moved = free + step
            value, slope = form.log_error(moved, x)
            height = objective(value - log_error, weight, delta=delta)
        ends.append((moved, value, slope, np.where(np.isfinite(height), height, np.inf)))
    first, second = ends
    pick = second[3] < first[3]
    return (
        np.where(pick[:, None], second[0], first[0]),
        np.where(pick[:, None], second[1], first[1]),
        np.where(pick[:, None, None], second[2], first[2]),
        np.where(pick, second[3], first[3]),
    )
