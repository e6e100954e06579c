"""Exact nearest centroids: a fast scan whose rounding can't change the answer.

The scan scores tiles by matrix products. Their last bits depend on the shape of the tile, the
thread count and the library, so the scan only proposes: every centroid whose score lies within a
proven bound of the row's best is a candidate, and rows with several candidates are decided by a
float64 distance whose sum has a fixed order. The label is therefore a pure function of the point
and the centroids: blocks, ranks, processors and the precision of the scan don't enter. Nor does a
GPU: there Triton kernels scan, and the rest is the same.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.exact import ordered_sum, pair_distances, resolve, resolve_together
from trainer.cluster.search.scan import Candidates, scan
from trainer.cluster.search.table import CentroidTable, margin_of, prepare, scores_of

__all__ = [
    "COLUMN_BLOCK",
    "ROW_BLOCK",
    "Candidates",
    "CentroidTable",
    "assign",
    "assign_block",
    "fastest_precision",
    "margin_of",
    "ordered_sum",
    "pair_distances",
    "prepare",
    "resolve",
    "scan",
    "scores_of",
]

ROW_BLOCK = 2048
COLUMN_BLOCK = 2048


def assign(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    row_block: int = ROW_BLOCK,
    column_block: int = COLUMN_BLOCK,
    precision: torch.dtype = torch.float32,
    fused: bool | None = None,
) -> Int64[Tensor, " n"]:
    """The nearest centroid of every point: argmin_k |x - c_k|^2, ties to the lowest k.

    Equal to the argmin of `pair_distances` whatever the block sizes, the precision of the scan
    and the kernel. Never holds more than row_block x column_block scores. Values must be finite.
    `fused`: by the Triton kernels; None on a GPU.
    """
    table = prepare(centroids, precision=precision, fused=fused)
    blocks = [
        assign_block(points[first : first + row_block], table, column_block=column_block)
        for first in range(0, points.shape[0], row_block)
    ]
    return torch.cat(blocks) if blocks else points.new_zeros(0, dtype=torch.int64)


def fastest_precision(points: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]) -> torch.dtype:
    """The scan precision that takes less time on this machine for these points; float32 in doubt.

    Timing may decide, because the labels are the same. Half precision is float16 on a GPU, where
    it is as fast as bfloat16 and rounds eight times less, and bfloat16 elsewhere.
    """
    points, seconds = points[:ROW_BLOCK], {}
    if points.shape[0] == 0:
        return torch.float32
    for precision in (torch.float32, torch.float16 if points.is_cuda else torch.bfloat16):
        table = prepare(centroids[: 4 * COLUMN_BLOCK], precision=precision)
        assign_block(points, table)
        start = time.perf_counter()
        assign_block(points, table)
        seconds[precision] = time.perf_counter() - start
    return min(seconds, key=lambda precision: seconds[precision])


def assign_block(
    points: Float[Tensor, "n d"], table: CentroidTable, *, column_block: int = COLUMN_BLOCK
) -> Int64[Tensor, " n"]:
    """As `assign`, for one block of points and a prepared table.

    If that is a slice of a larger one, all its scorers call with the same points, and each gets
    the labels among all centroids.
    """
    points = points.float()
    found = scan(points, table, column_block=column_block)
    pairs = (points, table.centroids, found.rows, found.columns)
    if table.scorers.world_size == 1:
        return resolve(*pairs)
    return resolve_together(*pairs, first=table.first, scorers=table.scorers)
