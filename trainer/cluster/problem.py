"""The question that k-means answers: checked points, their number, and the scale of their sums."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from trainer.cluster.assign import COLUMN_BLOCK, ROW_BLOCK, fastest_precision, ordered_sum
from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError, DataError
from trainer.hashing import hash_bits, key_of


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


class Problem(NamedTuple):
    """What stays the same over restarts and iterations."""

    points: Tensor
    ids: Tensor
    config: KMeansConfig
    comm: Comm
    num_points: int
    scale: float
    """A power of two: points enter sums as round(x * scale)."""
    sum_of_squares: float
    """Of all points on all ranks."""
    precision: torch.dtype
    """Of the scan on this rank."""


def pose(points: Tensor, ids: Tensor, config: KMeansConfig, comm: Comm) -> Problem:
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
    scale = _scale(num_points, largest_value, bits=52)
    norm_scale = _scale(num_points, points.shape[1] * largest_value**2, bits=62)
    total = torch.zeros(1, dtype=torch.int64, device=comm.device)
    for block in _blocks(points, config.row_block):
        total += (ordered_sum(block.double().square()) * norm_scale).round().long().sum()
    squares = int(comm.sum(total)) / norm_scale
    precision = _precision(points, config, comm)
    return Problem(points, ids, config, comm, num_points, scale, squares, precision)


def _precision(points: Tensor, config: KMeansConfig, comm: Comm) -> torch.dtype:
    if config.precision != "auto":
        return torch.float32 if config.precision == "float32" else torch.bfloat16
    some = points[: max(config.row_block, 2 * COLUMN_BLOCK)].to(comm.device, torch.float32)
    return fastest_precision(some[: config.row_block], some[: config.clusters])


def _blocks(points: Tensor, size: int) -> Iterator[Tensor]:
    """Consecutive blocks of at most `size` rows; none of no rows."""
    return (points[first : first + size] for first in range(0, points.shape[0], size))


def _scale(count: int, largest: float, *, bits: int) -> float:
    """The largest power of two for which `count` values up to `largest` sum below 2^bits."""
    if largest == 0.0:
        return 1.0
    exponent = bits - math.frexp(largest)[1] - count.bit_length()
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


def starting_points(problem: Problem, restart: int) -> Float[Tensor, "k d"]:
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
