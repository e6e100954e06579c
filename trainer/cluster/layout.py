"""How many ranks share the table of centroids."""

from __future__ import annotations

from trainer.cluster.grid import Grid
from trainer.cluster.problem import KMeansConfig
from trainer.comm import Comm
from trainer.errors import ConfigError

_NUMBER_BYTES = 4 + 4 + 8
"""Of a centroid, for each number: as float32, in the scan's precision at most, and in the sums."""


def laid_out(config: KMeansConfig, dim: int, comm: Comm) -> Grid:
    """The grid that the configuration asks for; every rank must call."""
    size = ranks_per_row(config, dim=dim, ranks=comm.world_size)
    return Grid(config.clusters, *comm.grid(size))


def ranks_per_row(config: KMeansConfig, *, dim: int, ranks: int) -> int:
    """Ranks that share a table: as configured, or the fewest with which a rank's part is within
    `centroid_gib`; all of them if none is enough. It divides the ranks.

    ConfigError for a grid that does not, and for searches that hold the whole table.
    """
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    if config.grid is not None:
        if config.grid not in sizes:
            raise ConfigError(
                f"grid: {config.grid} does not divide {ranks} ranks; use one of {sizes}"
            )
        size = config.grid
    else:
        budget = config.centroid_gib * 2**30
        fitting = [size for size in sizes if _part_bytes(config, dim, size) <= budget]
        size = fitting[0] if fitting else sizes[-1]
    if size > 1:
        _refuse_whole_tables(config, dim, size)
    return size


def _part_bytes(config: KMeansConfig, dim: int, size: int) -> int:
    return -(-config.clusters // size) * dim * _NUMBER_BYTES


def _refuse_whole_tables(config: KMeansConfig, dim: int, size: int) -> None:
    """ConfigError: only the exact search of our own is done in slices."""
    if config.backend == "torch" and config.assignment == "exact":
        return
    what = "backend: faiss" if config.backend == "faiss" else "assignment: two_level"
    gib = _part_bytes(config, dim, 1) / 2**30
    raise ConfigError(
        f"{what} holds all {config.clusters} centroids on every rank, {gib:.1f} GiB, and can't lie"
        f" on a grid of {size} ranks; use assignment: exact with backend: torch, or grid: 1 (or"
        f" centroid_gib above {gib:.1f}) if a rank has the memory"
    )
