"""Accuracy against frequency as it was published: a correlation over ten bin means.

It is close to one for almost any table, because averaging removes what concepts differ in. It is
here to be compared with published figures; `trend` has what can be said of concepts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

NUM_BINS = 12


class Binned(NamedTuple):
    log_edges: Float64[np.ndarray, " bins"]
    """Natural logarithms; a bin's right end, where it is plotted."""
    bin_of_concept: Int64[np.ndarray, " rows"]
    rows: Int64[np.ndarray, " bins"]
    mean: Float64[np.ndarray, " bins"]
    """Of accuracies; NaN in an empty bin."""
    deviation: Float64[np.ndarray, " bins"]
    """Standard deviation of the rows of a bin, not of its mean."""
    rho: float
    """Pearson's r of edges and means, without the first and the last bin; NaN under three bins."""
    p_value: float
    """Two-sided."""


def binned(
    counts: Int64[np.ndarray, " rows"],
    accuracy: Float64[np.ndarray, " rows"],
    *,
    num_bins: int = NUM_BINS,
) -> Binned:
    """Bins of equal width in ln(max(count, 1)), closed on the right; the first holds the minimum.

    Empty bins are left out of the correlation. Frequencies of 0 and 1 share the first bin, which
    the published figure drops together with the last.
    """
    logs = np.log(np.maximum(counts, 1).astype(np.float64))
    edges = np.linspace(logs.min(), logs.max(), num_bins)
    place = np.digitize(logs, edges, right=True)
    count = np.bincount(place, minlength=num_bins)[:num_bins]
    mean, deviation = np.full(num_bins, np.nan), np.full(num_bins, np.nan)
    for number in np.flatnonzero(count).tolist():
        rows = accuracy[place == number]
        mean[number], deviation[number] = rows.mean(), rows.std()
    inner = np.arange(1, num_bins - 1)
    rho, p_value = pearson(edges[inner], mean[inner])
    return Binned(edges, place, count, mean, deviation, rho, p_value)


def pearson(x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"]) -> tuple[float, float]:
    """Pearson's r and its two-sided p over the pairs without NaN; NaN where r has no meaning."""
    from scipy import stats  # takes two seconds to import

    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    found = stats.pearsonr(x, y)
    return float(found.statistic), float(found.pvalue)
