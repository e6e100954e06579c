"""Exact nearest centroids: a fast scan whose rounding can't change the answer.

The scan scores tiles by matrix products. Their last bits depend on the shape of the tile, the
thread count and the library, so the scan only proposes: every centroid whose score lies within a
proven bound of the row's best is a candidate, and rows with several candidates are decided by a
float64 distance whose sum has a fixed order. The label is therefore a pure function of the point
and the centroids: blocks, ranks, processors and the precision of the scan don't enter.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from trainer.hashing import hash_bits

ROW_BLOCK = 2048
COLUMN_BLOCK = 2048
_MEMBERS = 32
_NEVER = 1e38
_PAIR_ELEMENTS = 1 << 22
# of operands in float32 products on a GPU, by torch.get_float32_matmul_precision()
_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-10, "medium": 2.0**-8}


class CentroidTable(NamedTuple):
    """Centroids made ready for scanning; scores are (x - o).(c - o) - |c - o|^2 / 2."""

    centroids: Float[Tensor, "k d"]
    origin: Float[Tensor, " d"]
    """o: distances don't depend on it, rounding errors are small if it is near the points."""
    scanned: Float[Tensor, "columns width"]
    """Rows c - o in the precision of the scan; below float32 followed by the offset in parts."""
    offsets: Float[Tensor, " columns"]
    """-|c - o|^2 / 2; very small where a column is not eligible."""
    eligible: Bool[Tensor, " columns"]
    """False for filling and for copies of an earlier row, which never win a tie."""
    longest: float
    """Largest |c - o|."""
    rounding: float
    """Largest distance between c - o and its rounded form."""


class Candidates(NamedTuple):
    """Pairs of a point and a centroid that may be near; every point has one at least."""

    rows: Int64[Tensor, " p"]
    columns: Int64[Tensor, " p"]
    scores: Float[Tensor, " p"]


def assign(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    *,
    row_block: int = ROW_BLOCK,
    column_block: int = COLUMN_BLOCK,
    precision: torch.dtype = torch.float32,
) -> Int64[Tensor, " n"]:
    """The nearest centroid of every point: argmin_k |x - c_k|^2, ties to the lowest k.

    Equal to the argmin of `pair_distances` whatever the block sizes and the precision of the
    scan. Never holds more than row_block x column_block scores. Values must be finite.
    """
    table = prepare(centroids, precision=precision)
    blocks = [
        assign_block(points[first : first + row_block], table, column_block=column_block)
        for first in range(0, points.shape[0], row_block)
    ]
    return torch.cat(blocks) if blocks else points.new_zeros(0, dtype=torch.int64)


def prepare(
    centroids: Float[Tensor, "k d"], *, precision: torch.dtype = torch.float32
) -> CentroidTable:
    """What a scan over these centroids needs; costs one pass over them.

    `precision` float32 or bfloat16 is that of the scan's products. It changes how many candidates
    are looked at twice, never the labels.
    """
    centroids = centroids.float()
    total = ordered_sum(centroids.double().T.contiguous())
    origin = (total / centroids.shape[0]).float()
    shifted = centroids.double() - origin.double()
    filling = (0, -centroids.shape[0] % _MEMBERS)
    eligible = torch.nn.functional.pad(~_repeated(centroids), filling, value=False)
    squares = shifted.square().sum(1)
    offsets = torch.nn.functional.pad(-0.5 * squares, filling).float()
    offsets = offsets.masked_fill(~eligible, -_NEVER)
    rounded = shifted.to(precision)
    return CentroidTable(
        centroids=centroids,
        origin=origin,
        scanned=widened(torch.nn.functional.pad(rounded, (0, 0, *filling)), offsets),
        offsets=offsets,
        eligible=eligible,
        longest=float(squares.max().sqrt()),
        rounding=float((shifted - rounded.double()).norm(dim=1).max()),
    )


def fastest_precision(points: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"]) -> torch.dtype:
    """The scan precision that takes less time on this machine for these points; float32 in doubt.

    Timing may decide, because the labels are the same.
    """
    points, seconds = points[:ROW_BLOCK], {}
    if points.shape[0] == 0:
        return torch.float32
    for precision in (torch.float32, torch.bfloat16):
        table = prepare(centroids[: 4 * COLUMN_BLOCK], precision=precision)
        assign_block(points, table)
        start = time.perf_counter()
        assign_block(points, table)
        seconds[precision] = time.perf_counter() - start
    return min(seconds, key=lambda precision: seconds[precision])


def assign_block(
    points: Float[Tensor, "n d"], table: CentroidTable, *, column_block: int = COLUMN_BLOCK
) -> Int64[Tensor, " n"]:
    """As `assign`, for one block of points and a prepared table."""
    points = points.float()
    found = scan(points, table, column_block=column_block)
    return resolve(points, table.centroids, found.rows, found.columns)


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
    nearest = _nearest_of_pairs(points, centroids, rows[~alone], columns[~alone])
    return torch.where(per_row == 1, labels, nearest)


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


def scan(
    points: Float[Tensor, "n d"], table: CentroidTable, *, column_block: int, count: int = 1
) -> Candidates:
    """All pairs whose score may be among the row's `count` best, rounding considered."""
    shifted = points - table.origin
    rounded = shifted.to(table.scanned.dtype)
    margin = margin_of(shifted, rounded, table)
    wide = widened(rounded, None)
    best = margin.fixed.new_full((points.shape[0], count), -torch.inf)
    width = max(column_block // _MEMBERS, 1) * _MEMBERS
    found = []
    for first in range(0, table.scanned.shape[0], width):
        scores = scores_of(wide, table, slice(first, first + width))
        groups = scores.unflatten(1, (_members(scores.shape[1]), -1))
        tops = groups.amax(1)
        best = _best_so_far(best, tops)
        found.append(_in_reach(groups, tops, margin.below(best[:, -1]), first))
    together = Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    return _kept(together, margin.below(best[:, -1]), table)


def _best_so_far(best: Tensor, tops: Tensor) -> Tensor:
    """The best `count` maxima of groups, descending. The last is a bound below the count-th best
    score: each of the groups has one at least as good."""
    count = best.shape[1]
    if count == 1:
        return torch.maximum(best, tops.amax(1, keepdim=True).to(best.dtype))
    return torch.cat([best, tops.to(best.dtype)], 1).topk(count, dim=1).values


def _members(width: int) -> int:
    """Columns a group has in a tile, at most 32: maxima over less than 128 lanes are slow."""
    members = _MEMBERS
    while members > 1 and width < 128 * members:
        members //= 2
    return members


def scores_of(wide: Tensor, table: CentroidTable, columns: slice) -> Tensor:
    if wide.dtype == torch.float32:
        return torch.addmm(table.offsets[columns], wide, table.scanned[columns].T)
    return wide @ table.scanned[columns].T


def widened(rows: Tensor, offsets: Tensor | None) -> Tensor:
    """Below float32 a sum of products must bring the offset: as three columns of its parts.

    The other factor's rows (offsets None) get three columns of ones. Float32 rows stay as they
    are. The width is filled up to a multiple of 4.
    """
    if rows.dtype == torch.float32:
        return rows
    parts = [torch.ones_like(rows[:, 0])] * 3
    if offsets is not None:
        for place in range(3):
            parts[place] = offsets.to(rows.dtype)
            offsets = offsets - parts[place].float()
    wide = torch.cat([rows, torch.stack(parts, 1)], 1)
    return torch.nn.functional.pad(wide, (0, -wide.shape[1] % 4))


def _in_reach(groups: Tensor, tops: Tensor, threshold: Tensor, first: int) -> Candidates:
    """Candidates of one tile. "Not below" instead of "above": NaN (overflow) stays in."""
    row, group = (~(tops < threshold[:, None])).nonzero(as_tuple=True)
    scores = groups[row, :, group]
    entry, member = (~(scores < threshold[row, None])).nonzero(as_tuple=True)
    columns = first + member * groups.shape[2] + group[entry]
    return Candidates(row[entry], columns, scores[entry, member])


def _kept(found: Candidates, threshold: Tensor, table: CentroidTable) -> Candidates:
    """Candidates of earlier tiles against the final threshold; filling and repeats go."""
    keep = ~(found.scores < threshold[found.rows])
    keep &= table.eligible[found.columns]
    return Candidates(*(part[keep] for part in found))


class Margin(NamedTuple):
    """How far below the best score a column may lie and still be the nearest."""

    fixed: Float[Tensor, " n"]
    share: float
    """Of |best|: rounding of the scores themselves."""

    def below(self, best: Tensor) -> Tensor:
        """The threshold; monotone in `best`, so an early one keeps what a later one keeps."""
        return best.float() - self.fixed - self.share * best.float().abs()


def margin_of(shifted: Tensor, rounded: Tensor, table: CentroidTable) -> Margin:
    """From a bound E on the error of any score before it is rounded: 2 E + 2 u (|best| + 2 E),
    u the unit roundoff of the scores.

    E = |x - x'| |c| + |x'| |c - c'| for operands rounded to x', c'; (d + 16) u |x| |c| for a sum
    of products in any order (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1), for
    x - o, c - o and the offset; and what underflow loses.
    """
    lengths = shifted.norm(dim=1) * (1 + 2**-7)
    products = lengths * table.longest + 0.5 * table.longest * table.longest
    relative = (shifted.shape[1] + 16) * 2.0**-24
    if shifted.is_cuda and rounded.dtype == torch.float32:
        relative += 2 * _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()]
    error = relative * products + lengths * table.rounding
    error += (shifted - rounded.float()).norm(dim=1) * (1 + 2**-7) * table.longest
    error += shifted.shape[1] * 2.0**-120 * (1.0 + lengths + table.longest)
    # a sum may overflow on its way to a finite value: then all columns are candidates
    error = error.masked_fill(~(products < 2.0**100), torch.inf)
    share = 1.01 * torch.finfo(rounded.dtype).eps
    return Margin((2.0 + 2.0 * share) * error, share)


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
