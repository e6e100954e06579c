"""Centroids made ready for a scan, and how far its scores may be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from trainer.cluster.exact import ordered_sum
from trainer.comm import Comm
from trainer.hashing import hash_bits

MEMBERS = 32
"""The table is filled up to whole groups of so many columns."""
NEVER = 1e38
_ELEMENTS_AT_ONCE = 1 << 26
# of operands in float32 products on a GPU, by torch.get_float32_matmul_precision()
_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-10, "medium": 2.0**-8}
_TF32_CUT = 2.0**-10
_CUT_SUMS = 4.0


class CentroidTable(NamedTuple):
    """Centroids made ready for scanning; scores are (x - o).(c - o) - |c - o|^2 / 2.

    All of them, or this rank's slice where several ranks, the scorers, score the same points.
    """

    centroids: Float[Tensor, "k d"]
    origin: Float[Tensor, " d"]
    """o: distances don't depend on it, rounding errors are small if it is near the points."""
    scanned: Float[Tensor, "columns width"]
    """Rows c - o in the precision of the scan. Followed by zeros up to whole 16 bytes if `fused`;
    otherwise, below float32, by the offset in parts."""
    offsets: Float[Tensor, " columns"]
    """-|c - o|^2 / 2; very small where a column is not eligible."""
    eligible: Bool[Tensor, " columns"]
    """False for filling and for copies of an earlier row, which never win a tie."""
    longest: float
    """Largest |c - o|, of all scorers."""
    rounding: float
    """Largest distance between c - o and its rounded form, of all scorers."""
    fused: bool
    """Scored by the Triton kernels."""
    first: int
    """Number of the first row among all scorers' rows."""
    scorers: Comm


def prepare(
    centroids: Float[Tensor, "k d"],
    *,
    precision: torch.dtype = torch.float32,
    scorers: Comm | None = None,
    fused: bool | None = None,
) -> CentroidTable:
    """What a scan over these centroids needs; costs one pass over them.

    `precision` is that of the scan's products: float32 or bfloat16, and float16 where fused. It
    changes how many candidates are looked at twice, never the labels, and must be the same on all
    `scorers`, whose slices (in rank order, some may be empty) are one table. `fused`: for the
    Triton kernels; None on a GPU.
    """
    scorers = scorers or Comm.solo(centroids.device)
    fused = centroids.is_cuda if fused is None else fused
    centroids = centroids.float()
    sizes = scorers.all_gather(torch.tensor([len(centroids)], device=centroids.device)).tolist()
    origin = (_total(centroids, scorers) / sum(sizes)).float()
    columns = max(-(-len(centroids) // MEMBERS), 1) * MEMBERS
    eligible = pad(~repeated(centroids, scorers), (0, columns - len(centroids)), value=False)
    parts, longest, rounding = [], 0.0, 0.0
    for shifted, allowed in _shifted_parts(centroids, origin, eligible):
        squares, rounded = shifted.square().sum(1), shifted.to(precision)
        offsets = (-0.5 * squares).float().masked_fill(~allowed, -NEVER)
        parts.append((_laid_out(rounded, offsets, fused), offsets))
        longest = max(longest, float(squares.max().sqrt()))
        rounding = max(rounding, float((shifted - rounded.double()).norm(dim=1).max()))
    bounds = torch.tensor([longest, rounding], dtype=torch.float64, device=centroids.device)
    longest, rounding = scorers.max(bounds).tolist()
    scanned, offsets = (torch.cat(kind) for kind in zip(*parts, strict=True))
    first = sum(sizes[: scorers.rank])
    return CentroidTable(
        *(centroids, origin, scanned, offsets, eligible, longest, rounding, fused, first, scorers)
    )


def _total(centroids: Tensor, scorers: Comm) -> Tensor:
    """Sum of all scorers' rows in float64, in an order that depends on their slices alone."""
    parts = [
        ordered_sum(some.double().T.contiguous()) for some in centroids.split(_step(centroids))
    ]
    everyone = scorers.gather_rows(torch.stack(parts))
    return ordered_sum(everyone.T.contiguous())


def _step(centroids: Tensor) -> int:
    """Rows whose float64 copies are made at once."""
    return max(_ELEMENTS_AT_ONCE // max(centroids.shape[1], 1), MEMBERS) // MEMBERS * MEMBERS


def _shifted_parts(
    centroids: Tensor, origin: Tensor, eligible: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows c - o in float64, zeros where the table is filled up, and which are eligible."""
    step = _step(centroids)
    for first in range(0, len(eligible), step):
        allowed = eligible[first : first + step]
        shifted = centroids[first : first + step].double() - origin.double()
        yield pad(shifted, (0, 0, 0, len(allowed) - len(shifted))), allowed


def _laid_out(rounded: Tensor, offsets: Tensor, fused: bool) -> Tensor:
    if fused:
        return pad(rounded, (0, -rounded.shape[1] % (16 // rounded.dtype.itemsize)))
    return widened(rounded, offsets)


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
    return pad(wide, (0, -wide.shape[1] % 4))


def scores_of(wide: Tensor, table: CentroidTable, columns: slice) -> Tensor:
    """Of points in the table's precision (`widened`) with some columns, by plain products."""
    if wide.dtype == torch.float32:
        rows = table.scanned[columns, : wide.shape[1]]
        return torch.addmm(table.offsets[columns], wide, rows.T)
    return wide @ table.scanned[columns].T


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
    x - o, c - o and the offset; and what underflow loses. Matrix units cut sums off instead of
    rounding them (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021), hence four
    times as much where they sum.
    """
    lengths = shifted.norm(dim=1) * (1 + 2**-7)
    products = lengths * table.longest + 0.5 * table.longest * table.longest
    relative = (shifted.shape[1] + 16) * 2.0**-24 * (_CUT_SUMS if table.fused else 1.0)
    if rounded.dtype == torch.float32:
        relative += 2 * _operand_roundoff(shifted, table)
    error = relative * products + lengths * table.rounding
    if rounded is not shifted:
        error += (shifted - rounded.float()).norm(dim=1) * (1 + 2**-7) * table.longest
    error += shifted.shape[1] * 2.0**-120 * (1.0 + lengths + table.longest)
    # a sum may overflow on its way to a finite value: then all columns are candidates
    error = error.masked_fill(~(products < 2.0**100), torch.inf)
    share = 1.01 * torch.finfo(torch.float32 if table.fused else rounded.dtype).eps
    return Margin((2.0 + 2.0 * share) * error, share)


def _operand_roundoff(points: Tensor, table: CentroidTable) -> float:
    """Of float32 operands, in the Triton kernels or in the library's products."""
    allowed = _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()] if points.is_cuda else 0.0
    return max(allowed, _TF32_CUT) if table.fused else allowed


def repeated(centroids: Float[Tensor, "k d"], scorers: Comm) -> Bool[Tensor, " k"]:
    """True for a row that is bitwise a copy of an earlier one, on this rank or one before it.

    A collapsed encoder gives thousands of them, and each would be a candidate of every point.
    """
    keys = _keys(centroids)
    copies = _repeated_here(centroids, keys)
    if scorers.world_size == 1:
        return copies
    # of rows that are the first of their kind here, those whose key some other row has
    kept = (~copies).nonzero()[:, 0]
    found, times = scorers.gather_rows(keys[kept]).unique(return_counts=True)
    kept = kept[torch.isin(keys[kept], found[times > 1])]
    rows = scorers.gather_rows(centroids[kept])
    counts = scorers.all_gather(torch.tensor([len(kept)], device=kept.device)).tolist()
    begin = sum(counts[: scorers.rank])
    copies[kept] = _repeated_here(rows, _keys(rows))[begin : begin + len(kept)]
    return copies


def _keys(rows: Tensor) -> Int64[Tensor, " k"]:
    factors = hash_bits(torch.arange(rows.shape[1], device=rows.device)) | 1
    parts = rows.contiguous().view(torch.int32).split(_step(rows))
    return torch.cat([(bits.long() * factors).sum(1) for bits in parts])


def _repeated_here(rows: Tensor, keys: Tensor) -> Bool[Tensor, " k"]:
    order = torch.sort(keys, stable=True)
    first = torch.ones_like(order.values, dtype=torch.bool)
    first[1:] = order.values[1:] != order.values[:-1]
    starts = order.indices[first][first.long().cumsum(0) - 1]
    later, earlier = order.indices[~first], starts[~first]
    step = _step(rows)
    same = [
        (rows[some] == rows[others]).all(1)
        for some, others in zip(later.split(step), earlier.split(step), strict=True)
    ]
    return torch.zeros_like(first).scatter_(0, later, torch.cat(same))
