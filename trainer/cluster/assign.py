"""Exact nearest centroids: a fast scan whose rounding can't change the answer.

The scan scores tiles by matrix products. Their last bits depend on the shape of the tile, the
thread count and the library, so the scan only proposes: every centroid whose score lies within a
proven bound of the row's best is a candidate, and rows with several candidates are decided by a
float64 distance whose sum has a fixed order. The label is therefore a pure function of the point
and the centroids: blocks, ranks and processors don't enter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from trainer.hashing import hash_bits

ROW_BLOCK = 512
COLUMN_BLOCK = 2048
_MEMBERS = 32
_PAIR_ELEMENTS = 1 << 22
_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-10, "medium": 2.0**-8}


class CentroidTable(NamedTuple):
    """Centroids made ready for scanning; scores are (x - o).(c - o) - |c - o|^2 / 2."""

    centroids: Float[Tensor, "k d"]
    origin: Float[Tensor, " d"]
    """o: distances don't depend on it, rounding errors are small if it is near the points."""
    centred: Float[Tensor, "columns d"]
    """Rows c - o; zero rows fill up to a multiple of the group size."""
    offsets: Float[Tensor, " columns"]
    """-|c - o|^2 / 2, and -inf where a column is not eligible."""
    eligible: Bool[Tensor, " columns"]
    """False for filling and for copies of an earlier row, which never win a tie."""
    longest: float
    """Largest |c - o|."""


class _Candidates(NamedTuple):
    rows: Int64[Tensor, " p"]
    columns: Int64[Tensor, " p"]
    scores: Float[Tensor, " p"]


def assign(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    row_block: int = ROW_BLOCK,
    column_block: int = COLUMN_BLOCK,
) -> Int64[Tensor, " n"]:
    """The nearest centroid of every point: argmin_k |x - c_k|^2, ties to the lowest k.

    Equal to the argmin of `pair_distances` in float64 whatever the block sizes. Never holds more
    than row_block x column_block scores. Values must be finite.
    """
    table = prepare(centroids)
    blocks = [
        assign_block(points[first : first + row_block], table, column_block=column_block)
        for first in range(0, points.shape[0], row_block)
    ]
    return torch.cat(blocks) if blocks else points.new_zeros(0, dtype=torch.int64)


def prepare(centroids: Float[Tensor, "k d"]) -> CentroidTable:
    """What a scan over these centroids needs; costs one pass over them."""
    centroids = centroids.float()
    origin = centroids.double().mean(0).float()
    shifted = centroids.double() - origin.double()
    squares = shifted.square().sum(1)
    filling = -centroids.shape[0] % _MEMBERS
    eligible = torch.nn.functional.pad(~_repeated(centroids), (0, filling), value=False)
    offsets = torch.nn.functional.pad(-0.5 * squares, (0, filling)).float()
    return CentroidTable(
        centroids=centroids,
        origin=origin,
        centred=torch.nn.functional.pad(shifted.float(), (0, 0, 0, filling)),
        offsets=offsets.masked_fill(~eligible, -torch.inf),
        eligible=eligible,
        longest=float(squares.max().sqrt()),
    )


def assign_block(
    points: Float[Tensor, "n d"], table: CentroidTable, *, column_block: int = COLUMN_BLOCK
) -> Int64[Tensor, " n"]:
    """As `assign`, for one block of points and a prepared table."""
    points = points.float()
    found = _scan(points, table, column_block=column_block)
    per_row = torch.bincount(found.rows, minlength=points.shape[0])
    labels = torch.empty_like(per_row)
    alone = per_row[found.rows] == 1
    labels[found.rows[alone]] = found.columns[alone]
    if not bool(alone.all()):
        rows, columns = found.rows[~alone], found.columns[~alone]
        nearest = _nearest_of_pairs(points, table.centroids, rows, columns)
        labels = torch.where(per_row == 1, labels, nearest)
    return labels


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


def _scan(points: Tensor, table: CentroidTable, *, column_block: int) -> _Candidates:
    """All (row, column) whose score may be the row's best, rounding considered."""
    shifted = points - table.origin
    margin = _margin(shifted, table)
    best = torch.full_like(margin, -torch.inf)
    width = max(column_block // _MEMBERS, 1) * _MEMBERS
    found = []
    for first in range(0, table.centred.shape[0], width):
        columns = slice(first, first + width)
        scores = torch.addmm(table.offsets[columns], shifted, table.centred[columns].T)
        groups = scores.unflatten(1, (_MEMBERS, -1))
        tops = groups.amax(1)
        best = torch.maximum(best, tops.amax(1))
        found.append(_in_reach(groups, tops, best - margin, first))
    together = _Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return _kept(together, (best - margin), table)


def _in_reach(groups: Tensor, tops: Tensor, threshold: Tensor, first: int) -> _Candidates:
    """Candidates of one tile. "Not below" instead of "above": NaN (overflow) stays in."""
    row, group = (~(tops < threshold[:, None])).nonzero(as_tuple=True)
    scores = groups[row, :, group]
    entry, member = (~(scores < threshold[row, None])).nonzero(as_tuple=True)
    columns = first + member * groups.shape[2] + group[entry]
    return _Candidates(row[entry], columns, scores[entry, member])


def _kept(found: _Candidates, threshold: Tensor, table: CentroidTable) -> _Candidates:
    """Candidates of earlier tiles against the final threshold; filling and repeats go."""
    keep = ~(found.scores < threshold[found.rows])
    keep &= table.eligible[found.columns]
    return _Candidates(*(part[keep] for part in found))


def _margin(shifted: Tensor, table: CentroidTable) -> Tensor:
    """Twice a bound on the error of any score of each row.

    A sum of d products in any order errs by at most (d - 1) u |x| |c| (Higham, "Accuracy and
    Stability of Numerical Algorithms", 3.1); 8 covers the roundings of x - o, c - o, |c - o|^2
    and the addition. The last term bounds what underflow loses.
    """
    inputs = 0.0
    if shifted.is_cuda:
        inputs = 2 * _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()]
    relative = (shifted.shape[1] + 8) * 2.0**-24 + inputs
    lengths = shifted.norm(dim=1) * (1 + 2**-10)
    products = lengths * table.longest + 0.5 * table.longest * table.longest
    # a sum may overflow on its way to a finite value: then all columns are candidates
    relative_error = (relative * products).masked_fill(~(products < 2.0**100), torch.inf)
    margin: Tensor = 2.0 * (relative_error + shifted.shape[1] * 2.0**-125)
    return margin


def _nearest_of_pairs(
    points: Tensor, centroids: Tensor, rows: Tensor, columns: Tensor
) -> Int64[Tensor, " n"]:
    """Per row the nearest of its candidate columns, lowest column first; the rest is undefined."""
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
    nearest = torch.full_like(least, centroids.shape[0], dtype=torch.int64)
    nearest.scatter_reduce_(0, rows[tied], columns[tied], "amin")
    return nearest


def _repeated(centroids: Tensor) -> Bool[Tensor, " k"]:
    """True for a row that is bitwise a copy of an earlier one.

    A collapsed encoder gives thousands of them, and each would be a candidate of every point.
    """
    bits = centroids.contiguous().view(torch.int32).long()
    factors = hash_bits(torch.arange(centroids.shape[1], device=centroids.device)) | 1
    order = torch.sort((bits * factors).sum(1), stable=True)
    first = torch.ones_like(order.values, dtype=torch.bool)
    first[1:] = order.values[1:] != order.values[:-1]
    starts = order.indices[first][first.long().cumsum(0) - 1]
    same = (centroids[order.indices] == centroids[starts]).all(1) & ~first
    return torch.zeros_like(same).scatter_(0, order.indices, same)
