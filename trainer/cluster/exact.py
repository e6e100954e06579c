"""What decides between near centroids: float64 distances whose sums have a fixed order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.comm import Comm

_PAIR_ELEMENTS = 1 << 22
_NO_COLUMN = torch.iinfo(torch.int64).max


def pair_distances(
    points: Float[Tensor, "p d"], centroids: Float[Tensor, "p d"]
) -> Float64[Tensor, " p"]:
    """|x_p - c_p|^2 in float64; bit for bit the same whatever else is in the batch."""
    return ordered_sum((points.double() - centroids.double()).square())


def ordered_sum(terms: Float64[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """Row sums by halving. Only elementwise additions, so no library chooses the order.

    Overwrites `terms`.
    """
    width = terms.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:width]
        width = half
    return terms[:, 0].clone() if width else terms.new_zeros(terms.shape[0])


def resolve(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    rows: Int64[Tensor, " p"],
    columns: Int64[Tensor, " p"],
) -> Int64[Tensor, " n"]:
    """Per point the nearest of its candidates (row, column), ties to the lowest column.

    Every row needs a candidate; only rows with several cost a distance.
    """
    per_row = torch.bincount(rows, minlength=points.shape[0])
    labels = torch.empty_like(per_row)
    alone = per_row[rows] == 1
    labels[rows[alone]] = columns[alone]
    if bool(alone.all()):
        return labels
    _, nearest = _nearest_of_pairs(points, centroids, rows[~alone], columns[~alone])
    return torch.where(per_row == 1, labels, nearest)


def resolve_together(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    rows: Int64[Tensor, " p"],
    columns: Int64[Tensor, " p"],
    *,
    first: int,
    scorers: Comm,
) -> Int64[Tensor, " n"]:
    """As `resolve`, where each of the scorers has other columns of one table, numbered from
    `first`, for the same points; ties to the lowest number. Sends 16 bytes a point.

    Here a point may have candidates on one rank only.
    """
    distances, nearest = _nearest_of_pairs(points, centroids, rows, columns)
    nearest = torch.where(nearest == _NO_COLUMN, nearest, nearest + first)
    return scorers.min(nearest.masked_fill(distances != scorers.min(distances), _NO_COLUMN))


def _nearest_of_pairs(
    points: Tensor, centroids: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Float64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Per row the distance and number of the nearest of its candidates, lowest column first.

    Infinity, and the largest integer, where a row has no candidate.
    """
    step = max(_PAIR_ELEMENTS // max(points.shape[1], 1), 1)
    distances = torch.cat(
        [
            pair_distances(points[some_rows], centroids[some_columns])
            for some_rows, some_columns in zip(rows.split(step), columns.split(step), strict=True)
        ]
    )
    least = distances.new_full((points.shape[0],), torch.inf)
    least.scatter_reduce_(0, rows, distances, "amin")
    tied = distances == least[rows]
    nearest = torch.full_like(least, _NO_COLUMN, dtype=torch.int64)
    nearest.scatter_reduce_(0, rows[tied], columns[tied], "amin")
    return least, nearest
