"""The several nearest centroids of every point: exact, or among the nearest cells.

As for the nearest one, a fast scan proposes and float64 distances of fixed order decide. So the
lists depend on the points and the centroids alone, and the first of a list is the label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.search.assign import (
    COLUMN_BLOCK,
    CentroidTable,
    margin_of,
    pair_distances,
    scan,
    scores_of,
)
from trainer.cluster.search.two_level import Cells, candidates_of_cells, probed

_PAIRS = 1 << 16


class Nearest(NamedTuple):
    """Nearest first, ties to the lowest id. A centroid that copies an earlier one is left out."""

    ids: Int64[Tensor, "n l"]
    """-1 where there are fewer than l centroids."""
    distances: Float[Tensor, "n l"]
    """Squared, float32; infinity beside -1."""


def nearest(
    points: Float[Tensor, "n d"],
    table: CentroidTable,
    *,
    count: int,
    column_block: int = COLUMN_BLOCK,
) -> Nearest:
    """The `count` centroids of least |x - c|^2, for one block of points and a prepared table.

    If that is a slice of a larger one, all its scorers call with the same points, and each gets
    the lists among all centroids.
    """
    points = points.float()
    found = scan(points, table, column_block=column_block, count=count)
    distances = _distances(points, table.centroids, found.rows, found.columns)
    pairs = (found.rows, found.columns + table.first, distances)
    everyone = [table.scorers.gather_rows(part) for part in pairs]
    return _listed(*everyone, num_rows=points.shape[0], count=count)


def nearest_two_level(points: Float[Tensor, "n d"], cells: Cells, *, count: int) -> Nearest:
    """As `nearest`, among the centroids of the point's nearest cells."""
    points = points.float()
    shifted = points - cells.table.origin
    rows, members = probed(shifted, cells)
    tops, bound = _tops_of_cells(shifted, rows, members, cells, count)
    threshold = margin_of(shifted, shifted, cells.table).below(bound)
    pairs = candidates_of_cells(shifted, rows, members, tops, threshold, cells)
    distances = _distances(points, cells.centroids, *pairs)
    return _listed(*pairs, distances, num_rows=points.shape[0], count=count)


def _tops_of_cells(
    shifted: Tensor, rows: Tensor, members: list[int], cells: Cells, count: int
) -> tuple[Tensor, Tensor]:
    """The best score in the cell for each pair of point and cell, and for each point a bound below
    its count-th best score over its cells; minus infinity where it has fewer."""
    tops = shifted.new_empty(rows.shape[0])
    best = shifted.new_full((shifted.shape[0], count), -torch.inf)
    place = 0
    for cell, chosen in enumerate(rows.split(members)):
        columns = slice(cells.starts[cell], cells.starts[cell + 1])
        if chosen.shape[0]:
            scores = scores_of(shifted.index_select(0, chosen), cells.table, columns)
            maxima = _maxima(scores, count)
            tops[place : place + len(chosen)] = maxima.amax(1)
            best[chosen] = torch.cat([best[chosen], maxima], 1).topk(count, dim=1).values
            place += len(chosen)
    return tops, best[:, -1]


def _maxima(scores: Float[Tensor, "n k"], count: int) -> Float[Tensor, "n groups"]:
    """Of some 4 x count groups of columns: the count-th best of them is the bound wanted, and they
    are fewer to sort than the scores."""
    members = max(scores.shape[1] // (4 * count), 1)
    whole = scores.shape[1] // members * members
    groups = scores[:, :whole].unflatten(1, (members, -1)).amax(1)
    return torch.cat([groups, scores[:, whole:]], 1)


def _distances(points: Tensor, centroids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of the candidates (row, column), in float64."""
    return torch.cat(
        [columns.new_zeros(0, dtype=torch.float64)]
        + [
            pair_distances(points[some_rows], centroids[some_columns])
            for some_rows, some_columns in zip(
                rows.split(_PAIRS), columns.split(_PAIRS), strict=True
            )
        ]
    )


def _listed(
    rows: Tensor, columns: Tensor, distances: Tensor, *, num_rows: int, count: int
) -> Nearest:
    """The candidates in order of distance, then of column; the first `count` of a row."""
    order = torch.argsort(columns, stable=True)
    order = order[torch.argsort(distances[order], stable=True)]
    order, owners = _grouped(order, rows[order])
    place = _place_in_row(owners, num_rows)
    kept = place < count
    order, owners, place = order[kept], owners[kept], place[kept]
    ids = columns.new_full((num_rows, count), -1)
    ids[owners, place] = columns[order]
    values = distances.new_full((num_rows, count), torch.inf, dtype=torch.float32)
    values[owners, place] = distances[order].float()
    return Nearest(ids, values)


def _grouped(order: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bring equal rows together, their order kept."""
    by_row = torch.argsort(rows, stable=True)
    return order[by_row], rows[by_row]


def _place_in_row(rows: Tensor, num_rows: int) -> Tensor:
    """0, 1, 2, ... within each run of equal (sorted) rows."""
    counts = torch.bincount(rows, minlength=num_rows)
    starts = counts.cumsum(0) - counts
    return torch.arange(rows.shape[0], device=rows.device) - starts[rows]
