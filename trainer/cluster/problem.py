"""The question that k-means answers: checked points, their number, and the scale of their sums."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from trainer.cluster.exact import ordered_sum
from trainer.cluster.grid import Grid
from trainer.cluster.points import Points
from trainer.cluster.ranks.together import together
from trainer.cluster.search.assign import COLUMN_BLOCK, ROW_BLOCK, fastest_precision
from trainer.cluster.search.two_level import MOST_DIMS
from trainer.comm import Comm, agreed
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError, DataError

_LARGEST = 2.0**127


class KMeansConfig(Frozen):
    """How to cluster."""

    clusters: PositiveInt
    """K, over all ranks."""
    iterations: PositiveInt = 20
    """Centroid updates at most."""
    start: Literal["sampled", "parallel", "hierarchical"] = "sampled"
    """`sampled`: points drawn by hash. `parallel`: k-means||, far apart; at most 50000 clusters.
    `hierarchical`: a k-means in every cell of a coarse one, for very many clusters."""
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
    """Points scored at once, by all ranks that score together. The result does not depend on it."""
    assignment: Literal["exact", "two_level"] = "exact"
    """`two_level` looks for the nearest centroid in the nearest coarse cells only. Its labels, and
    so the objective, may be worse than the best; it pays from some thousand clusters on."""
    cells: PositiveInt | None = None
    """Coarse cells of the two-level assignment; about sqrt(K) where None. Where clusters are tight
    and far apart, twice as many with twice the probes find more for the same time."""
    probes: PositiveInt = 8
    """Cells a point looks into, about, on average; points between cells look into up to four times
    as many. More cost time and find better centroids."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the scan's products; `auto` times float32 and a half precision. float16 is for GPUs. The
    result does not depend on it."""
    column_block: PositiveInt = COLUMN_BLOCK
    """Centroids scored at once on a CPU. The result does not depend on it."""
    grid: PositiveInt | None = None
    """Ranks that share one table of centroids and score the same points, each its slice; 1: every
    rank holds all. None: as few as `centroid_gib` allows. The result does not depend on it."""
    centroid_gib: float = Field(default=16.0, gt=0.0)
    """GiB that centroids, their copy for scoring and their sums may take of a rank, 16 bytes for
    every number. What is larger is divided over a grid of ranks."""


class KMeansResult(NamedTuple):
    """Centroids and counts are global and equal on all ranks (of `cluster_on`, centroids are those
    that the rank holds); labels are this rank's."""

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


class Facts(NamedTuple):
    """What a look at all points tells; plain numbers, so that a resumed run need not look again."""

    num_points: int
    """On all ranks."""
    largest: float
    """Largest absolute value."""
    sum_of_squares: float


class Problem(NamedTuple):
    """What stays the same over restarts and iterations."""

    points: Points
    config: KMeansConfig
    comm: Comm
    facts: Facts
    scale: float
    """A power of two: points enter sums as round(x * scale)."""
    precision: torch.dtype
    """Of the scan; equal on ranks that score together."""
    grid: Grid
    initial: Float[Tensor, "held d"] | None = None
    """Where the first restart begins; where the configuration says if None."""

    @property
    def num_points(self) -> int:
        return self.facts.num_points

    @property
    def held_shape(self) -> tuple[int, int]:
        """Of the centroids that this rank holds."""
        return (self.grid.held.stop - self.grid.held.start, self.points.dim)


def pose(
    points: Points,
    config: KMeansConfig,
    comm: Comm,
    grid: Grid,
    *,
    initial: Float[Tensor, "k d"] | None = None,
    facts: Facts | None = None,
) -> Problem:
    """Check the points; choose the scale of the integers from their number and largest value.

    Reads the points twice, or not at all if the `facts` about them are given. `initial`: the
    centroids to begin with, all of them or those that this rank holds.
    """
    if config.assignment == "two_level" and points.dim > MOST_DIMS:
        raise ConfigError(
            f"two-level assignment takes vectors of at most {MOST_DIMS} numbers, and these have"
            f" {points.dim}; use exact assignment"
        )
    facts = facts or _look_at(points, config, comm)
    count = int(comm.sum(torch.tensor([len(points)], device=comm.device)))
    if count != facts.num_points:
        raise ConfigError(
            f"the points are {count} and were {facts.num_points} when this clustering began;"
            " start it again"
        )
    scale = whole_number_scale(facts.num_points, facts.largest, bits=52)
    precision = scan_precision(points, config, comm, grid)
    problem = Problem(points, config, comm, facts, scale, precision, grid)
    return problem if initial is None else problem._replace(initial=_held(initial, problem))


def _held(initial: Tensor, problem: Problem) -> Tensor:
    shape = (problem.config.clusters, problem.points.dim)
    if initial.shape == shape:
        return problem.grid.part(initial)
    if initial.shape != problem.held_shape:
        raise ConfigError(f"the initial centroids are {tuple(initial.shape)} and must be {shape}")
    return initial


def _look_at(points: Points, config: KMeansConfig, comm: Comm) -> Facts:
    largest = _largest(points, config.row_block, comm)
    num_points = int(comm.sum(torch.tensor([len(points)], device=comm.device)))
    if largest > _LARGEST:
        raise DataError(
            f"a value of the points to cluster is {largest:.3g} in size, and centroids and their"
            f" halves would overflow float32 above {_LARGEST:.3g}; scale the vectors"
        )
    if num_points < config.clusters:
        raise ConfigError(
            f"{config.clusters} clusters need at least as many points and there are {num_points};"
            f" use at most {num_points} clusters or more samples"
        )
    norm_scale = whole_number_scale(num_points, points.dim * largest**2, bits=62)
    total = torch.zeros(1, dtype=torch.int64, device=comm.device)
    for step in together(points, config.row_block, comm):
        squares = ordered_sum(step.points.double().square())
        total += (squares * norm_scale).round().long().sum()
    return Facts(num_points, largest, int(comm.sum(total)) / norm_scale)


def _largest(points: Points, size: int, comm: Comm) -> float:
    """Largest absolute value on all ranks. DataError where a value is not finite."""
    largest = torch.zeros(1, dtype=torch.float64, device=comm.device)
    lowest_bad, num_bad = torch.iinfo(torch.int64).max, 0
    for step in together(points, size, comm):
        bad = ~torch.isfinite(step.points).all(1)
        if bool(bad.any()):
            ids = points.ids(step.place.start, step.place.stop).cpu()[bad.cpu()]
            lowest_bad = min(lowest_bad, int(ids.min()))
            num_bad += len(ids)
        largest = torch.maximum(largest, step.points.abs().max().double())
    count = int(comm.sum(torch.tensor([num_bad], device=comm.device)))
    named = int(comm.min(torch.tensor([lowest_bad], device=comm.device)))
    if count:
        raise DataError(
            f"{count} of the points to cluster are not finite, the lowest sample id of them is"
            f" {named}; look at that sample's features"
        )
    return float(comm.max(largest))


def scan_precision(
    points: Points, config: KMeansConfig, comm: Comm, grid: Grid | None = None
) -> torch.dtype:
    """Of the scan's products: as configured, or the one that is faster on this rank.

    Where one of the ranks that score together takes float32, all do. Every rank must call.
    """
    if config.precision == "float16" and comm.device.type == "cpu":
        raise ConfigError("precision: float16 is for GPUs; use auto, float32 or bfloat16")
    found = [torch.float32 if config.precision == "auto" else getattr(torch, config.precision)]

    def measure() -> None:
        count = min(len(points), max(config.row_block, 2 * COLUMN_BLOCK))
        some = points.rows(0, count).to(comm.device, torch.float32)
        found.append(fastest_precision(some[: config.row_block], some[: config.clusters]))

    unknown = config.precision == "auto" and config.assignment == "exact"
    agreed(comm, measure if unknown else lambda: None)
    own: torch.dtype = found[-1]
    if grid is not None and grid.scorers.any(own == torch.float32):
        return torch.float32
    return own


def whole_number_scale(count: int, largest: float, *, bits: int) -> float:
    """The largest power of two for which `count` values up to `largest` sum below 2^bits."""
    if largest == 0.0:
        return 1.0
    exponent = bits - math.frexp(largest)[1] - count.bit_length()
    return math.ldexp(1.0, min(exponent, 1000))
