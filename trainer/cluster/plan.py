"""What a clustering will cost, before it starts: bytes per rank, products, hours."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from trainer.cluster.layout import ranks_per_row
from trainer.cluster.problem import KMeansConfig
from trainer.cluster.search.table import MEMBERS
from trainer.cluster.search.two_level import rows_at_once
from trainer.errors import ConfigError

_COARSE_UPDATES = 5
_PEAK_SIZE = 1024


class Plan(NamedTuple):
    """Of one rank, if not said otherwise. Bytes are exact for k-means' own arrays."""

    grid: tuple[int, int]
    """Groups of ranks, and the ranks of a group: they score the same points, each against its
    slice of the centroids."""
    held: int
    """Centroids that a rank holds."""
    points_bytes: int
    centroid_bytes: int
    """The float32 centroids held and the table made for scanning, in float32 at most."""
    sums_bytes: int
    """float64 sums and int64 counts of the clusters held, before they are reduced and after."""
    start_bytes: int
    """While the start is made, instead of the two before."""
    scratch_bytes: int
    """Scores and candidates of one block; independent of the number of points."""
    scores_per_point: float
    """Centroids (and cells) a point is compared with in one pass."""
    flop_per_pass: float
    """Of the products, over all ranks: 2 x points x scores x dim, cells included."""
    reduced_bytes: int
    """Sent per pass by the reduce-scatter of sums and the gather of centroids."""
    exchanged_bytes: int
    """Points received per pass from the other ranks of the group."""
    hours: float
    """All passes, at the given share of the given peak."""

    @property
    def total_bytes(self) -> int:
        """At most."""
        passing = self.centroid_bytes + self.sums_bytes + self.scratch_bytes
        return self.points_bytes + max(passing, self.start_bytes)

    def __str__(self) -> str:
        names = ("points", "centroids", "sums", "scratch", "the start instead")
        sizes = (
            *(self.points_bytes, self.centroid_bytes, self.sums_bytes, self.scratch_bytes),
            self.start_bytes,
        )
        groups, size = self.grid
        layout = f"grid {groups} x {size}: a point is scored by {size} of {groups * size} ranks"
        memory = ", ".join(f"{n} {size / 2**30:.2f}" for n, size in zip(names, sizes, strict=True))
        return (
            f"{layout}, each with {self.held} centroids; "
            f"GiB per rank: {self.total_bytes / 2**30:.2f} ({memory}); "
            f"{self.flop_per_pass:.3g} FLOP a pass, {self.scores_per_point:.0f} scores a point; "
            f"{self.reduced_bytes / 2**30:.2f} GiB of sums and centroids and "
            f"{self.exchanged_bytes / 2**30:.2f} GiB of points sent per rank and pass; "
            f"{self.hours:.2f} h in all"
        )


def plan(
    config: KMeansConfig,
    *,
    points: int,
    dim: int,
    ranks: int,
    point_bytes: int = 4,
    peak_flops: float,
    share_of_peak: float = 0.4,
    device: torch.device | str = "cpu",
) -> Plan:
    """Cost of `kmeans` for `points` rows of `dim` numbers over all ranks.

    `point_bytes`: of one number as it is kept (4 float32, 2 half precision; 0 if the points stay
    on disk). `peak_flops`: of one rank. Counts products only; reading and sending points is not in
    `hours`. ConfigError if there are fewer points than clusters, or the search does not go on the
    grid that the centroids need.
    """
    clusters, per_rank = config.clusters, -(-points // ranks)
    if points < clusters:
        raise ConfigError(f"{clusters} clusters for {points} points; use at most {points}")
    two_level = config.assignment == "two_level"
    cells = min(config.cells or math.isqrt(clusters), clusters) if two_level else 0
    scores = cells + config.probes * clusters / cells if two_level else float(clusters)
    coarse = 2.0 * _COARSE_UPDATES * clusters * cells * dim
    flop = 2.0 * points * min(scores, cells + clusters) * dim + coarse
    rows = max(config.row_block, rows_at_once(dim, device) if two_level else 0)
    size = ranks_per_row(config, dim=dim, ranks=ranks)
    groups, held = ranks // size, -(-clusters // size)
    owned = -(-held // groups)
    passes = (config.iterations + 1) * config.restarts
    return Plan(
        grid=(groups, size),
        held=held,
        points_bytes=per_rank * dim * point_bytes,
        centroid_bytes=held * dim * (4 + 4),
        sums_bytes=owned * groups * (dim + 1) * 8 + owned * dim * 8 * (groups > 1),
        start_bytes=_start_bytes(config, dim, ranks, size),
        scratch_bytes=rows * (4 * _scores_at_once(config, cells, held) + (8 + 8 + 4) * dim),
        scores_per_point=scores,
        flop_per_pass=flop,
        reduced_bytes=(groups - 1) * owned * dim * (8 + 4),
        exchanged_bytes=(size - 1) * per_rank * dim * 4,
        hours=passes * flop / (ranks * peak_flops * share_of_peak) / 3600.0,
    )


def _start_bytes(config: KMeansConfig, dim: int, ranks: int, size: int) -> int:
    """Of rows in float32: a whole table and what it is put together from (twice where the rows are
    put in order), or a slice and the rows that a rank gives."""
    if config.start != "sampled":
        return 2 * config.clusters * dim * 4
    if size == 1:
        return 3 * config.clusters * dim * 4
    return (-(-config.clusters // size) + 2 * -(-config.clusters // ranks)) * dim * 4


def _scores_at_once(config: KMeansConfig, cells: int, held: int) -> int:
    """Of one point: a tile's, or on a GPU the maxima of groups of columns."""
    return max(cells, config.column_block, held // MEMBERS)


def measured_peak(device: torch.device) -> float:
    """FLOP a second of a float32 product of 1024 x 1024 matrices here, the best of five."""
    matrix = torch.randn(_PEAK_SIZE, _PEAK_SIZE, device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * _PEAK_SIZE**3 / best
