"""Nearest centroids among those of the nearest cells: about 2 sqrt(K) scores a point, not K.

Centroids are grouped into coarse cells. A point looks into its nearest cell and into all that are
about as near, and its label is the exact nearest centroid of these cells. "About as near" is a
difference of scores for which centroids themselves would look into `probes` cells on average: a
point amid a cell looks into few, one between cells into many. Which cells these are is decided in
integers, so here too blocks, ranks and processors don't enter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from trainer.cluster.search.assign import (
    CentroidTable,
    margin_of,
    prepare,
    resolve,
    scores_of,
)

_ELEMENTS, _DEVICE_ELEMENTS = 1 << 22, 1 << 27
_LEAST_ROWS, _MOST_ROWS, _MOST_DEVICE_ROWS = 1 << 12, 1 << 16, 1 << 18
_ROWS_AT_ONCE, _DEVICE_ROWS_AT_ONCE = 2048, 1 << 16
_SAMPLES = 2048
_MOST = 4
"""Times `probes`: cells that any point looks into at most (ties apart)."""
_POINT_LEVELS, _CELL_LEVELS = 127.0, 63.0
_LARGEST_SUM = 1 << 24
MOST_DIMS = int(_LARGEST_SUM / (_POINT_LEVELS * _CELL_LEVELS))
"""Sums of products of the whole numbers must be exact in float32."""


class Cells(NamedTuple):
    """Centroids in order of their cell."""

    table: CentroidTable
    centroids: Float[Tensor, "k d"]
    """In order of id, as they were given."""
    ids: Int64[Tensor, " k"]
    """The centroid of each row of the table; ascending within a cell."""
    starts: list[int]
    """First row of each cell, and K."""
    coarse: Float[Tensor, "cells d"]
    """Cell centres minus the origin, in whole numbers from -63 to 63."""
    coarse_scale: float
    coarse_offsets: Float[Tensor, " cells"]
    reach: float
    """How far below a point's best cell another one may score for the point to look into it."""
    most: int
    """Cells that a point looks into at most; of more, the nearest."""


def group_into_cells(
    centroids: Float[Tensor, "k d"],
    centres: Float[Tensor, "cells d"],
    cell_of: Int64[Tensor, " k"],
    *,
    probes: int,
) -> Cells:
    """Make centroids ready for `assign_two_level`; `cell_of` is the cell of each centroid.

    `probes`: cells that a point looks into, on average over the centroids taken as points. Cells
    without a centroid are dropped. Takes at most MOST_DIMS dimensions.
    """
    if centroids.shape[1] > MOST_DIMS:
        raise ValueError(
            f"two-level assignment takes at most {MOST_DIMS} dims, not {centroids.shape[1]}"
        )
    used, cell_of = torch.unique(cell_of, return_inverse=True)
    sizes = torch.bincount(cell_of, minlength=len(used))
    ids = torch.argsort(cell_of, stable=True)
    table = prepare(centroids[ids])
    centred = centres[used].float() - table.origin
    scale = max(float(centred.abs().max()) / _CELL_LEVELS, torch.finfo(torch.float32).tiny)
    coarse = (centred / scale).round()
    cells = Cells(
        table=table,
        centroids=centroids,
        ids=ids,
        starts=[0, *sizes.cumsum(0).tolist()],
        coarse=coarse,
        coarse_scale=scale,
        coarse_offsets=(-0.5 * (coarse.double() * scale).square().sum(1)).float(),
        reach=torch.inf,
        most=len(used),
    )
    if probes >= len(used):
        return cells
    return cells._replace(reach=_reach(cells, probes), most=min(_MOST * probes, len(used)))


def _reach(cells: Cells, probes: int) -> float:
    """The difference of scores within which some of the centroids see `probes` cells each."""
    some = cells.centroids[:: -(-cells.centroids.shape[0] // _SAMPLES)].float()
    scores = _cell_scores(some - cells.table.origin, cells)
    behind = (scores.amax(0) - scores).flatten()
    return float(behind.kthvalue(probes * some.shape[0]).values)


def rows_at_once(dim: int, device: torch.device | str = "cpu") -> int:
    """Points to take together: many, so that each cell has some, in 16 MiB. On a GPU in 512 MiB:
    each cell costs some fifteen launches a block, however few points look into it."""
    if torch.device(device).type == "cpu":
        return min(max(_ELEMENTS // dim, _LEAST_ROWS), _MOST_ROWS)
    return min(max(_DEVICE_ELEMENTS // dim, _LEAST_ROWS), _MOST_DEVICE_ROWS)


def assign_two_level(points: Float[Tensor, "n d"], cells: Cells) -> Int64[Tensor, " n"]:
    """The nearest centroid of every point among its nearest cells, ties to the lowest id.

    Holds a byte for every point and cell: give it `rows_at_once`.
    """
    shifted = points.float() - cells.table.origin
    rows, members = probed(shifted, cells)
    tops = _best_of_cells(shifted, rows, members, cells)
    best = tops.new_full((points.shape[0],), -torch.inf).scatter_reduce_(0, rows, tops, "amax")
    threshold = margin_of(shifted, shifted, cells.table).below(best)
    pairs = candidates_of_cells(shifted, rows, members, tops, threshold, cells)
    return resolve(points.float(), cells.centroids, *pairs)


def probed(
    shifted: Float[Tensor, "n d"], cells: Cells
) -> tuple[Int64[Tensor, " pairs"], list[int]]:
    """Rows of the points that look into each cell, cell by cell, and how many each cell has."""
    count = cells.coarse.shape[0]
    inside = torch.empty(count, shifted.shape[0], dtype=torch.bool, device=shifted.device)
    size = _ROWS_AT_ONCE if shifted.device.type == "cpu" else _DEVICE_ROWS_AT_ONCE
    for first in range(0, shifted.shape[0], size):
        places = slice(first, first + size)
        inside[:, places] = _looked_into(_cell_scores(shifted[places], cells), cells)
    pairs = inside.nonzero()
    return pairs[:, 1].contiguous(), torch.bincount(pairs[:, 0], minlength=count).tolist()


def _cell_scores(shifted: Float[Tensor, "n d"], cells: Cells) -> Float[Tensor, "cells n"]:
    """(x - o).(g - o) - |g - o|^2 / 2 of the rounded values. The products are sums of whole numbers
    below 2^24 and the rest is elementwise, so every bit is determined."""
    scale = shifted.abs().amax(1) / _POINT_LEVELS
    whole = (shifted / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
    scores = (cells.coarse @ whole.T).mul_(scale * cells.coarse_scale)
    return scores.add_(cells.coarse_offsets[:, None])


def _looked_into(scores: Float[Tensor, "cells n"], cells: Cells) -> Bool[Tensor, "cells n"]:
    """Cells within reach of the best one, but not more than the `most` best (ties included)."""
    # "not below" instead of "at least": NaN (overflow) looks into every cell
    below = scores < scores.amax(0) - cells.reach
    many = (below.shape[0] - below.sum(0) > cells.most).nonzero()[:, 0]
    if many.shape[0]:
        chosen = scores[:, many]
        last = chosen.topk(cells.most, dim=0, sorted=False).values.amin(0)
        below[:, many] |= chosen < last
    return below.logical_not_()


def _best_of_cells(shifted: Tensor, rows: Tensor, members: list[int], cells: Cells) -> Tensor:
    """The best score in the cell for each pair of point and cell."""
    tops = shifted.new_empty(rows.shape[0])
    place = 0
    for cell, count in enumerate(members):
        if count:
            columns = slice(cells.starts[cell], cells.starts[cell + 1])
            chosen = rows[place : place + count]
            scores = scores_of(shifted.index_select(0, chosen), cells.table, columns)
            tops[place : place + count] = scores.amax(1)
            place += count
    return tops


def candidates_of_cells(
    shifted: Float[Tensor, "n d"],
    rows: Int64[Tensor, " pairs"],
    members: list[int],
    tops: Float[Tensor, " pairs"],
    threshold: Float[Tensor, " n"],
    cells: Cells,
) -> tuple[Int64[Tensor, " p"], Int64[Tensor, " p"]]:
    """(row, centroid id) of every score at or above the row's threshold.

    Looks again into the cells whose best score reaches it.
    """
    near = ~(tops < threshold[rows])
    passed = torch.nn.functional.pad(near.long().cumsum(0), (1, 0))
    ends = torch.tensor([0, *members]).cumsum(0).to(passed.device, non_blocking=True)
    found_rows, found_ids = [rows[:0]], [rows[:0]]
    for cell, chosen in enumerate(rows[near].split(passed[ends].diff().tolist())):
        if chosen.shape[0] == 0:
            continue
        first, last = cells.starts[cell], cells.starts[cell + 1]
        scores = scores_of(shifted.index_select(0, chosen), cells.table, slice(first, last))
        within = ~(scores < threshold[chosen, None]) & cells.table.eligible[first:last]
        entry, column = within.nonzero(as_tuple=True)
        found_rows.append(chosen[entry])
        found_ids.append(cells.ids[first + column])
    return torch.cat(found_rows), torch.cat(found_ids)
