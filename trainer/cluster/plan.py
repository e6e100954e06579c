"""What a clustering will cost, before it starts: bytes per rank, products, hours."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from trainer.cluster.problem import KMeansConfig
from trainer.errors import ConfigError

_COARSE_UPDATES = 5
_PEAK_SIZE = 1024


class Plan(NamedTuple):
    """Of one rank, if not said otherwise. Bytes are exact for k-means' own arrays."""

    points_bytes: int
    centroid_bytes: int
    """The float32 centroids and the table made for scanning."""
    sums_bytes: int
    """float64 sums and int64 counts of all clusters, before they are reduced."""
    scratch_bytes: int
    """Scores and candidates of one block; independent of the number of points."""
    scores_per_point: float
    """Centroids (and cells) a point is compared with in one pass."""
    flop_per_pass: float
    """Of the products, over all ranks: 2 x points x scores x dim, cells included."""
    reduced_bytes: int
    """Sent per pass by the reduce-scatter of sums and the gather of centroids."""
    hours: float
    """All passes, at the given share of the given peak."""

    @property
    def total_bytes(self) -> int:
        return self.points_bytes + self.centroid_bytes + self.sums_bytes + self.scratch_bytes

    def __str__(self) -> str:
        names = ("points", "centroids", "sums", "scratch")
        sizes = (self.points_bytes, self.centroid_bytes, self.sums_bytes, self.scratch_bytes)
        memory = ", ".join(f"{n} {size / 2**30:.2f}" for n, size in zip(names, sizes, strict=True))
        return (
            f"GiB per rank: {self.total_bytes / 2**30:.2f} ({memory}); "
            f"{self.flop_per_pass:.3g} FLOP a pass, {self.scores_per_point:.0f} scores a point; "
            f"{self.reduced_bytes / 2**30:.2f} GiB sent per rank and pass; "
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
) -> Plan:
    """Cost of `kmeans` for `points` rows of `dim` numbers over all ranks.

    `point_bytes`: of one number as it is kept (4 float32, 2 half precision; 0 if the points stay
    on disk). `peak_flops`: of one rank. Counts products only; reading points is not in `hours`.
    ConfigError if there are fewer points than clusters.
    """
    clusters, per_rank = config.clusters, -(-points // ranks)
    if points < clusters:
        raise ConfigError(f"{clusters} clusters for {points} points; use at most {points}")
    two_level = config.assignment == "two_level"
    cells = min(config.cells or math.isqrt(clusters), clusters) if two_level else 0
    scores = cells + config.probes * clusters / cells if two_level else float(clusters)
    coarse = 2.0 * _COARSE_UPDATES * clusters * cells * dim
    flop = 2.0 * points * min(scores, cells + clusters) * dim + coarse
    rows = config.row_block if not two_level else max(config.row_block, 16384)
    padded = -(-clusters // ranks) * ranks
    passes = (config.iterations + 1) * config.restarts
    return Plan(
        points_bytes=per_rank * dim * point_bytes,
        centroid_bytes=clusters * dim * (4 + 4 + 8),
        sums_bytes=padded * (dim + 1) * 8,
        scratch_bytes=rows * (4 * max(cells, config.column_block) + (8 + 8 + 4) * dim),
        scores_per_point=scores,
        flop_per_pass=flop,
        reduced_bytes=(ranks - 1) * padded * dim * (8 + 4) // ranks,
        hours=passes * flop / (ranks * peak_flops * share_of_peak) / 3600.0,
    )


def measured_peak(device: torch.device) -> float:
    """FLOP a second of a float32 product of 1024 x 1024 matrices here, the best of five."""
    matrix = torch.randn(_PEAK_SIZE, _PEAK_SIZE, device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * _PEAK_SIZE**3 / best
