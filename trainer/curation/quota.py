"""How many samples of each cluster are kept."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray

_BISECTIONS = 200


def quotas(
    counts: Int64[np.ndarray, " clusters"], share: float, *, alpha: float = 1.0
) -> Int64[np.ndarray, " clusters"]:
    """Whole numbers, at least 1 of a cluster that has any, growing with `share`.

    With `alpha` 1 they are round(share * n), half to even: every cluster gives the same share
    (TL;DR, arXiv 2305.20087). Below 1, round(min(n, c * n^alpha)) with the c that fills the total:
    small clusters give more of themselves, at 0 all give the same number.
    """
    wanted = (
        share * counts if alpha == 1 else filled_quotas(counts, share * counts.sum(), alpha=alpha)
    )
    found: NDArray[np.int64] = np.clip(np.rint(wanted), 1, counts).astype(np.int64)
    return np.asarray(np.where(counts > 0, found, 0), np.int64)


def filled_quotas(
    counts: Int64[np.ndarray, " clusters"], target: float, *, alpha: float
) -> Float64[np.ndarray, " clusters"]:
    """min(n, c * n^alpha) with the c whose sum is `target`: what full clusters can't give, the
    others do."""
    size = counts.astype(np.float64)
    powers = np.where(counts > 0, np.maximum(size, 1) ** alpha, 0.0)
    low, high = 0.0, float(size.max(initial=1.0))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.minimum(size, middle * powers).sum() < target:
            low = middle
        else:
            high = middle
    return np.asarray(np.minimum(size, high * powers))


def kept_shares(
    counts: Int64[np.ndarray, " clusters"], share: float, *, alpha: float
) -> Float64[np.ndarray, " clusters"]:
    """The probability with which each sample of a cluster is in an epoch; none is above 1."""
    found = filled_quotas(counts, share * counts.sum(), alpha=alpha)
    return np.asarray(np.divide(found, counts, out=np.zeros(len(counts)), where=counts > 0))


def merged_clusters(
    centroids: Float64[np.ndarray, "clusters dim"], min_cosine: float
) -> Int64[np.ndarray, " clusters"]:
    """Of each cluster the number of the group that it is in: centroids that are so near, directly
    or over others between them, are one group."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit = centroids / np.maximum(lengths, 1e-30)
    rows, columns = [], []
    for first in range(0, len(unit), _CENTROIDS_AT_ONCE):
        near = unit[first : first + _CENTROIDS_AT_ONCE] @ unit.T >= min_cosine
        some, others = np.nonzero(near)
        rows.append(some + first)
        columns.append(others)
    places = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(places[0]), bool), places), shape=(len(unit),) * 2)
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


_CENTROIDS_AT_ONCE = 1024
