"""Lloyd's k-means over points that stay on the rank that made them.

Every quantity that decides anything is a sum of integers or a float64 expression of fixed order:
points enter the sums as int64 multiples of a power of two, and `assign` is exact. The centroids
are therefore bit for bit the same for every world size, block size and order of points.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from trainer.cluster import two_level
from trainer.cluster.assign import (
    COLUMN_BLOCK,
    ROW_BLOCK,
    assign_block,
    fastest_precision,
    ordered_sum,
    prepare,
)
from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError, DataError
from trainer.hashing import hash_bits, key_of

_SPLIT = 1.0 / 1024.0
_FAISS_CLUSTERS = 50_000
_FAISS_BYTES = 8 << 30


class KMeansConfig(Frozen):
    """How to cluster."""

    clusters: PositiveInt
    """K, over all ranks."""
    iterations: PositiveInt = 20
    """Centroid updates at most."""
    restarts: PositiveInt = 1
    """Runs from different starting points; the one with the least inertia is kept."""
    spherical: bool = False
    """Scale the centroids to length one after every update."""
    seed: int = 1234
    tolerance: float = Field(default=0.0, ge=0.0)
    """Stop when the objective fell by less than this share of itself. Zero: at the fixed point."""
    backend: Literal["torch", "faiss"] = "torch"
    """`faiss` gathers all points on rank 0: at most 50000 clusters and 8 GiB of points."""
    row_block: PositiveInt = ROW_BLOCK
    """Points scored at once. The result does not depend on it."""
    assignment: Literal["exact", "two_level"] = "exact"
    """`two_level` looks for the nearest centroid in the nearest coarse cells only. Its labels, and
    so the objective, may be worse than the best; it pays from some thousand clusters on."""
    cells: PositiveInt | None = None
    """Coarse cells of the two-level assignment; about sqrt(K) where None."""
    probes: PositiveInt = 8
    """Cells a point looks into. More cost time and find better centroids."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the scan's products; `auto` times both. The result does not depend on it."""
    column_block: PositiveInt = COLUMN_BLOCK
    """Centroids scored at once. The result does not depend on it."""


class KMeansResult(NamedTuple):
    """Centroids and counts are global and equal on all ranks; labels are this rank's."""

    centroids: Float[Tensor, "k d"]
    labels: Int64[Tensor, " n"]
    """The nearest centroid of each local point (lowest id in a tie); for two-level assignment the
    nearest of those looked at."""
    counts: Int64[Tensor, " k"]
    objective: list[float]
    """Mean squared distance per point before each update."""
    repaired: int
    """Empty clusters that were refilled by splitting the largest one."""
    inertia: float
    """Sum of squared distances of all points to the final centroids."""


class _Problem(NamedTuple):
    """What stays the same over restarts and iterations."""

    points: Tensor
    ids: Tensor
    config: KMeansConfig
    comm: Comm
    num_points: int
    scale: float
    """A power of two: integers are round(x * scale)."""
    sum_of_squares: float
    """Of all points on all ranks."""


class _Sums(NamedTuple):
    """One pass over the points. Rows of `sums` are this rank's share of the clusters."""

    labels: Int64[Tensor, " n"]
    sums: Int64[Tensor, "rows d"]
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
    clusters. Holds K x d integers per rank and nothing of size N x K.
    """
    problem = _posed(points, ids, config, comm)
    if config.backend == "faiss":
        return _by_faiss(problem, initial)
    best: KMeansResult | None = None
    for restart in range(config.restarts):
        start = initial if initial is not None and restart == 0 else _start(problem, restart)
        result = _lloyd(problem, start.to(comm.device, torch.float32))
        if best is None or result.inertia < best.inertia:
            best = result
    assert best is not None
    return best


# -- the problem ------------------------------------------------------------------------------


def _posed(points: Tensor, ids: Tensor, config: KMeansConfig, comm: Comm) -> _Problem:
    """Check the points; choose the scale of the integers from their number and largest value."""
    _check_finite(points, ids, comm)
    local = torch.tensor([points.shape[0]], device=comm.device)
    num_points = int(comm.sum(local))
    if num_points < config.clusters:
        raise ConfigError(
            f"{config.clusters} clusters need at least as many points and there are {num_points};"
            f" use at most {num_points} clusters or more samples"
        )
    largest = points.new_zeros(1, dtype=torch.float64).to(comm.device)
    for block in _blocks(points, config.row_block):
        largest = torch.maximum(largest, block.abs().max().double())
    largest_value = float(comm.max(largest))
    scale = _scale(num_points, largest_value)
    norm_scale = _scale(num_points, points.shape[1] * largest_value**2)
    total = torch.zeros(1, dtype=torch.int64, device=comm.device)
    for block in _blocks(points, config.row_block):
        total += (ordered_sum(block.double().square()) * norm_scale).round().long().sum()
    squares = int(comm.sum(total)) / norm_scale
    return _Problem(points, ids, config, comm, num_points, scale, squares)


def _blocks(points: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive blocks of at most `size` rows; none of no rows."""
    return (points[first : first + size] for first in range(0, points.shape[0], size))


def _scale(count: int, largest: float) -> float:
    """The largest power of two for which `count` values up to `largest` sum below 2^62."""
    if largest == 0.0:
        return 1.0
    exponent = 62 - math.frexp(largest)[1] - count.bit_length()
    return math.ldexp(1.0, min(exponent, 1000))


def _check_finite(points: Tensor, ids: Tensor, comm: Comm) -> None:
    bad = torch.cat(
        [torch.zeros(0, dtype=torch.bool, device=points.device)]
        + [~torch.isfinite(block).all(1) for block in _blocks(points, ROW_BLOCK)]
    )
    last = torch.iinfo(torch.int64).max
    lowest = torch.where(bad, ids, last).min() if bad.any() else torch.tensor(last)
    count = int(comm.sum(bad.sum()[None].to(comm.device)))
    named = int(comm.min(lowest[None].to(comm.device)))
    if count:
        raise DataError(
            f"{count} of the points to cluster are not finite, the lowest sample id of them is"
            f" {named}; look at that sample's features"
        )


def _start(problem: _Problem, restart: int) -> Float[Tensor, "k d"]:
    """The K points whose ids have the smallest hash, in order of the hash."""
    clusters, comm = problem.config.clusters, problem.comm
    bits = hash_bits(problem.ids, key_of(problem.config.seed, "kmeans start", restart))
    local = torch.sort(bits).values[:clusters]
    threshold = torch.sort(comm.gather_rows(local)).values[clusters - 1]
    chosen = bits <= threshold
    rows = comm.gather_rows(problem.points[chosen].float())
    keys = comm.gather_rows(bits[chosen])
    order = _lexicographic(keys, rows)
    return rows[order[:clusters]]


def _lexicographic(keys: Tensor, rows: Tensor) -> Tensor:
    """Order by key; equal keys (an id given twice) by the row's values, wherever the row was."""
    order = torch.argsort(keys, stable=True)
    if torch.unique(keys).numel() < keys.numel():
        order = torch.arange(keys.shape[0], device=keys.device)
        for column in reversed(range(rows.shape[1])):
            order = order[torch.argsort(rows[order, column], stable=True)]
        order = order[torch.argsort(keys[order], stable=True)]
    return order


# -- iterations -------------------------------------------------------------------------------


def _lloyd(problem: _Problem, centroids: Tensor) -> KMeansResult:
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


def _settled(objective: list[float], value: float, tolerance: float) -> bool:
    """True when the last update lowered the objective, but by less than asked for."""
    if not objective or tolerance == 0.0:
        return False
    return 0.0 <= objective[-1] - value < tolerance * objective[-1]


def _pass(problem: _Problem, centroids: Tensor) -> _Sums:
    """Assign every local point and add it, as integers, to its cluster; then reduce."""
    config, comm, points = problem.config, problem.comm, problem.points
    rows = -(-config.clusters // comm.world_size) * comm.world_size
    sums = torch.zeros((rows, points.shape[1]), dtype=torch.int64, device=comm.device)
    counts = torch.zeros(rows, dtype=torch.int64, device=comm.device)
    labels = torch.empty(points.shape[0], dtype=torch.int64, device=comm.device)
    step, nearest_of = _assigner(problem, centroids)
    for first in range(0, points.shape[0], step):
        block = points[first : first + step].to(comm.device, torch.float32)
        nearest = nearest_of(block)
        sums.index_add_(0, nearest, (block.double() * problem.scale).round().long())
        counts.index_add_(0, nearest, torch.ones_like(nearest))
        labels[first : first + step] = nearest
    return _Sums(labels, comm.reduce_scatter(sums), comm.sum(counts)[: config.clusters])


def _assigner(problem: _Problem, centroids: Tensor) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many points to take at once, and the function that labels them."""
    config = problem.config
    if config.assignment == "exact":
        table = prepare(centroids, precision=_precision(problem, centroids))
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


def _precision(problem: _Problem, centroids: Tensor) -> torch.dtype:
    if problem.config.precision == "auto":
        block = problem.points[: problem.config.row_block]
        return fastest_precision(block.to(centroids.device, torch.float32), centroids)
    return torch.float32 if problem.config.precision == "float32" else torch.bfloat16


def _objective(problem: _Problem, found: _Sums, centroids: Tensor) -> float:
    """Mean of |x - c|^2 = (sum |x|^2 + sum_k n_k |c_k|^2 - 2 c_k . s_k) / N, from exact sums."""
    first, last = problem.comm.row_range(problem.config.clusters)
    own = centroids[first:last].double()
    means = found.sums[: last - first].double() / problem.scale
    terms = ordered_sum((found.counts[first:last, None] * own - 2.0 * means) * own)
    everyone = problem.comm.gather_rows(terms)
    total = problem.sum_of_squares + float(ordered_sum(everyone[None].clone()))
    return max(total, 0.0) / problem.num_points


def _updated(problem: _Problem, found: _Sums, centroids: Tensor) -> tuple[Tensor, int]:
    """Means of the clusters, empty ones refilled; how many were."""
    comm, clusters = problem.comm, problem.config.clusters
    first, last = comm.row_range(clusters)
    own = centroids.new_zeros((found.sums.shape[0], centroids.shape[1]))
    counts = found.counts[first:last, None].double()
    means = (found.sums[: last - first].double() / problem.scale / counts.clamp(min=1)).float()
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


# -- the peer ---------------------------------------------------------------------------------


def _by_faiss(problem: _Problem, initial: Tensor | None) -> KMeansResult:
    """faiss.Kmeans on rank 0, on points in order of id; then one exact pass of our own.

    With more than 256 points a cluster faiss trains on a sample of them, as by default.
    """
    config, comm = problem.config, problem.comm
    _check_faiss_limits(problem)
    rows = comm.gather_rows(problem.points.float().to(comm.device))
    order = torch.argsort(comm.gather_rows(problem.ids.to(comm.device)), stable=True)
    centroids = rows.new_zeros((config.clusters, rows.shape[1]))
    objective: list[float] = []
    if comm.is_main:
        centroids, objective = _train_faiss(rows[order].cpu(), config, initial)
    centroids = comm.broadcast(centroids.to(comm.device))
    objective = comm.broadcast_json(objective)
    found = _pass(problem, centroids)
    inertia = _objective(problem, found, centroids) * problem.num_points
    return KMeansResult(centroids, found.labels, found.counts, objective, 0, inertia)


def _train_faiss(
    points: Tensor, config: KMeansConfig, initial: Tensor | None
) -> tuple[Tensor, list[float]]:
    import faiss

    trainer = faiss.Kmeans(
        points.shape[1],
        config.clusters,
        niter=config.iterations,
        nredo=config.restarts,
        seed=config.seed,
        spherical=config.spherical,
        min_points_per_centroid=1,
        gpu=faiss.get_num_gpus() > 0,
    )
    start = None if initial is None else initial.cpu().float().numpy()
    trainer.train(points.contiguous().numpy(), init_centroids=start)
    # the log runs over all restarts, and its unit is the sum over the points trained on
    used = min(points.shape[0], 256 * config.clusters)
    assert trainer.obj is not None
    assert trainer.centroids is not None
    objective = [float(value) / used for value in trainer.obj]
    return torch.from_numpy(trainer.centroids.copy()), objective


def _check_faiss_limits(problem: _Problem) -> None:
    clusters, size = problem.config.clusters, problem.num_points * problem.points.shape[1] * 4
    if clusters > _FAISS_CLUSTERS or size > _FAISS_BYTES:
        raise ConfigError(
            f"backend faiss takes at most {_FAISS_CLUSTERS} clusters and {_FAISS_BYTES >> 30} GiB"
            f" of points, and these are {clusters} and {size / 2**30:.1f} GiB; use backend: torch"
        )
