"""Which runs of a study a law in compute is fitted to, as weights of all of them.

A choice takes how often each point is there (zero to many times, as a bootstrap draws them) and
keeps a part of it, so that an interval is one over runs *and* over what is chosen of them. Points
are sorted by compute and then by error; rows of `counts` are tables that are judged one by one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float64

Frontier = Literal["all", "pareto", "log2_bins"]


def chosen(
    counts: Float64[np.ndarray, "draws points"],
    compute: Float64[np.ndarray, " points"],
    error: Float64[np.ndarray, " points"],
    *,
    frontier: Frontier,
) -> Float64[np.ndarray, "draws points"]:
    """`counts` of the points that the choice keeps, zero elsewhere.

    `pareto`: those better than everything that costs no more. `log2_bins`: the best of each
    doubling of compute, [2^k, 2^(k+1)), that has any.
    """
    if frontier == "all":
        return counts
    there = np.where(counts > 0, error, np.inf)
    if frontier == "pareto":
        before = np.minimum.accumulate(there, axis=1)
        better = there[:, 1:] < before[:, :-1]
        first = np.isfinite(there[:, :1])
        return np.where(np.concatenate([first, better], axis=1), counts, 0.0)
    keep = np.zeros(counts.shape, dtype=bool)
    doubling = np.floor(np.log2(compute))
    for number in np.unique(doubling):
        places = np.flatnonzero(doubling == number)
        best = places[np.argmin(there[:, places], axis=1)]
        keep[np.arange(len(counts)), best] = True
    return np.where(keep, counts, 0.0)
