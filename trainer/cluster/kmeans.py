"""Lloyd's k-means over points that stay on the rank that made them.

Every quantity that decides anything is a sum of whole numbers or a float64 expression of fixed
order: points enter the sums as multiples of a power of two chosen so that no sum reaches 2^53,
where float64 is exact in any order (and several times as fast as int64 here); and `assign` is
exact. The centroids are therefore bit for bit the same for every world size, block size and order
of points.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.cluster import two_level
from trainer.cluster.assign import assign_block, ordered_sum, prepare
from trainer.cluster.faiss_peer import faiss_centroids
from trainer.cluster.problem import KMeansConfig, KMeansResult, Problem, pose, starting_points
from trainer.comm import Comm
from trainer.errors import ConfigError

__all__ = ["KMeansConfig", "KMeansResult", "kmeans"]

_SPLIT = 1.0 / 1024.0


class _Sums(NamedTuple):
    """One pass over the points. Rows of `sums` are this rank's share of the clusters."""

    labels: Int64[Tensor, " n"]
    sums: Float64[Tensor, "rows d"]
    """Whole numbers: sums of round(x * scale)."""
    counts: Int64[Tensor, " k"]


def kmeans(
    points: Float[Tensor, "n d"],
    ids: Int64[Tensor, " n"],
    config: KMeansConfig,
    comm: Comm,
    *,
    initial: Float[Tensor, "k d"] | None = None,
) -> KMeansResult:
    """Cluster the ranks' points together: Lloyd's iterations from K points chosen by hash of id.

    `points` and `ids` are this rank's and may be empty; every rank must call. Ids name the points
    whatever rank holds them; rows that only fill up (id -1) must be left out by the caller.
    `initial` (equal on all ranks) replaces the start of the first restart.
    The result equals, bit for bit, that of one rank holding all points.
    DataError names the sample of a non-finite value; ConfigError if there are fewer points than
    clusters. Holds K x d float64 sums per rank and nothing of size N x K.
    """
    problem = pose(points, ids, config, comm)
    shape = (config.clusters, points.shape[1])
    if initial is not None and initial.shape != shape:
        raise ConfigError(f"the initial centroids are {tuple(initial.shape)} and must be {shape}")
    if config.backend == "faiss":
        return _by_faiss(problem, initial)
    best: KMeansResult | None = None
    for restart in range(config.restarts):
        given = initial if restart == 0 else None
        start = starting_points(problem, restart) if given is None else given
        result = _lloyd(problem, start.to(comm.device, torch.float32))
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None
    return best


def _lloyd(problem: Problem, centroids: Tensor) -> KMeansResult:
    config = problem.config
    if config.spherical:
        centroids = _unit(centroids, instead=centroids)
    objective: list[float] = []
    repaired = 0
    while True:
        found = _pass(problem, centroids)
        value = _objective(problem, found, centroids)
        if len(objective) == config.iterations or _settled(objective, value, config.tolerance):
            break
        objective.append(value)
        moved, splits = _updated(problem, found, centroids)
        repaired += splits
        if torch.equal(moved, centroids):
            break
        centroids = moved
    inertia = value * problem.num_points
    return KMeansResult(centroids, found.labels, found.counts, objective, repaired, inertia)


def _by_faiss(problem: Problem, initial: Tensor | None) -> KMeansResult:
    """faiss's centroids, then one exact pass of our own for labels, counts and inertia."""
    centroids, objective = faiss_centroids(problem, initial)
    found = _pass(problem, centroids)
    inertia = _objective(problem, found, centroids) * problem.num_points
    return KMeansResult(centroids, found.labels, found.counts, objective, 0, inertia)


def _settled(objective: list[float], value: float, tolerance: float) -> bool:
    """True when the last update lowered the objective, but by less than asked for."""
    if not objective or tolerance == 0.0:
        return False
    return 0.0 <= objective[-1] - value < tolerance * objective[-1]


def _pass(problem: Problem, centroids: Tensor) -> _Sums:
    """Assign every local point and add it, as whole numbers, to its cluster; then reduce."""
    config, comm, points = problem.config, problem.comm, problem.points
    rows = -(-config.clusters // comm.world_size) * comm.world_size
    sums = torch.zeros((rows, points.shape[1]), dtype=torch.float64, device=comm.device)
    counts = torch.zeros(rows, dtype=torch.int64, device=comm.device)
    labels = torch.empty(points.shape[0], dtype=torch.int64, device=comm.device)
    step, nearest_of = _assigner(problem, centroids)
    for first in range(0, points.shape[0], step):
        block = points[first : first + step].to(comm.device, torch.float32)
        nearest = nearest_of(block)
        sums.index_add_(0, nearest, (block.double() * problem.scale).round_())
        counts.index_add_(0, nearest, torch.ones_like(nearest))
        labels[first : first + step] = nearest
    return _Sums(labels, comm.reduce_scatter(sums), comm.sum(counts)[: config.clusters])


def _assigner(problem: Problem, centroids: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many points to take at once, and the function that labels them."""
    config = problem.config
    if config.assignment == "exact":
        table = prepare(centroids, precision=problem.precision)
        return config.row_block, partial(
            assign_block, table=table, column_block=config.column_block
        )
    cells = _cells(centroids, config)
    return max(config.row_block, two_level.ROWS), partial(two_level.assign_two_level, cells=cells)


def _cells(centroids: Tensor, config: KMeansConfig) -> two_level.Cells:
    """Coarse cells: a k-means of the centroids, on every rank the same."""
    count = min(config.cells or math.isqrt(config.clusters), config.clusters)
    coarse = KMeansConfig(clusters=count, iterations=4, seed=config.seed, precision="float32")
    ids = torch.arange(config.clusters, device=centroids.device)
    found = kmeans(centroids, ids, coarse, Comm.solo(centroids.device))
    return two_level.group_into_cells(
        centroids, found.centroids, found.labels, probes=config.probes
    )


def _objective(problem: Problem, found: _Sums, centroids: Tensor) -> float:
    """Mean of |x - c|^2 = (sum |x|^2 + sum_k n_k |c_k|^2 - 2 c_k . s_k) / N, from exact sums."""
    first, last = problem.comm.row_range(problem.config.clusters)
    own = centroids[first:last].double()
    means = found.sums[: last - first] / problem.scale
    terms = ordered_sum((found.counts[first:last, None] * own - 2.0 * means) * own)
    everyone = problem.comm.gather_rows(terms)
    total = problem.sum_of_squares + float(ordered_sum(everyone[None].clone()))
    return max(total, 0.0) / problem.num_points


def _updated(problem: Problem, found: _Sums, centroids: Tensor) -> tuple[Tensor, int]:
    """Means of the clusters, empty ones refilled; how many were."""
    comm, clusters = problem.comm, problem.config.clusters
    first, last = comm.row_range(clusters)
    own = centroids.new_zeros((found.sums.shape[0], centroids.shape[1]))
    counts = found.counts[first:last, None].double()
    means = (found.sums[: last - first] / problem.scale / counts.clamp(min=1)).float()
    kept = centroids[first:last]
    means = torch.where(counts > 0, means, kept)
    own[: last - first] = _unit(means, instead=kept) if problem.config.spherical else means
    moved, splits = _refilled(comm.all_gather(own)[:clusters], found.counts)
    return (_unit(moved, instead=moved) if problem.config.spherical and splits else moved), splits


def _refilled(centroids: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """Give every empty cluster half of the largest one: copies of its centroid pushed apart.

    Empty clusters in order of id; of equally large donors the lowest id. Coordinates of the two
    halves differ by factors 1 +- 1/1024 with alternating sign, as in faiss, which draws the donor.
    """
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return centroids, 0
    heap = [(-count, cluster) for cluster, count in enumerate(counts.tolist()) if count]
    heapq.heapify(heap)
    signs = torch.ones(centroids.shape[1], device=centroids.device)
    signs[1::2] = -1.0
    for cluster in empty:
        size, donor = heapq.heappop(heap)
        centroids[cluster] = centroids[donor] * (1.0 + _SPLIT * signs)
        centroids[donor] *= 1.0 - _SPLIT * signs
        for part, owner in ((-(-size // 2), donor), (size // 2, cluster)):
            heapq.heappush(heap, (part, owner))
    return centroids, len(empty)


def _unit(rows: Tensor, *, instead: Tensor) -> Tensor:
    """Rows scaled to length one; a zero row is replaced by that of `instead`."""
    lengths = ordered_sum(rows.double().square()).sqrt()[:, None]
    return torch.where(lengths > 0, (rows.double() / lengths).float(), instead)
