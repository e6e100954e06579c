"""The power law of error over compute as it was published for CLIP models (arXiv 2212.07143).

Equal bins of log10 compute; of each the centre and the least error; a least-squares line. The
centre is not where the best run of a bin stands, so other choices are fitted beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

NUM_BINS = 5
PAST_THE_LAST = 0.1
"""How far the last edge lies behind the largest point, in decades."""


class PowerLaw(NamedTuple):
    """error = beta * compute ** alpha."""

    alpha: float
    beta: float
    """In the table's unit of compute."""

    def __call__(self, compute: float | NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.beta * np.asarray(compute, dtype=np.float64) ** self.alpha)


def binned_power_law(
    compute: Float64[np.ndarray, " points"],
    error: Float64[np.ndarray, " points"],
    *,
    num_bins: int = NUM_BINS,
) -> PowerLaw:
    """The line through (centre, least error) of each bin that has a point."""
    x, y = np.log10(compute), np.log10(error)
    edges = np.linspace(x.min(), x.max() + PAST_THE_LAST, num_bins + 1)
    place = np.digitize(x, edges) - 1
    filled = np.unique(place)
    best = np.array([y[place == number].min() for number in filled])
    return _line((edges[filled] + edges[filled + 1]) / 2, best)


def power_law(
    compute: Float64[np.ndarray, " points"], error: Float64[np.ndarray, " points"]
) -> PowerLaw:
    """The least-squares line through all points in log-log."""
    return _line(np.log10(compute), np.log10(error))


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> PowerLaw:
    offset = x - x.mean()
    spread = float(offset @ offset)
    slope = float(offset @ y) / spread if spread else float("nan")
    return PowerLaw(slope, float(10.0 ** (y.mean() - slope * x.mean())))
