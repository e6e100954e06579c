"""The fast scan that proposes: all pairs whose score may be among a row's best."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from trainer.cluster.search.table import (
    MEMBERS,
    CentroidTable,
    Margin,
    margin_of,
    scores_of,
    widened,
)
from trainer.comm import Comm

_PAIRS = 1 << 20


class Candidates(NamedTuple):
    """Pairs of a point and a centroid that may be near.

    Every point has one at least, on one of the scorers.
    """

    rows: Int64[Tensor, " p"]
    columns: Int64[Tensor, " p"]
    """In this rank's slice."""
    scores: Float[Tensor, " p"]


def scan(
    points: Float[Tensor, "n d"], table: CentroidTable, *, column_block: int, count: int = 1
) -> Candidates:
    """This rank's pairs whose score may be among the row's `count` best, rounding considered.

    All scorers call it with the same points: the best are those of the whole table. On a GPU by
    Triton kernels, which choose their own tiles; elsewhere `column_block` columns at a time.
    """
    shifted = points - table.origin
    rounded = shifted.to(table.scanned.dtype)
    margin = margin_of(shifted, rounded, table)
    if table.fused:
        return _fused(rounded, table, margin, count)
    wide = widened(rounded, None)
    best = margin.fixed.new_full((points.shape[0], count), -torch.inf)
    width = max(column_block // MEMBERS, 1) * MEMBERS
    found = []
    for first in range(0, table.scanned.shape[0], width):
        scores = scores_of(wide, table, slice(first, first + width))
        groups = scores.unflatten(1, (_members(scores.shape[1]), -1))
        tops = groups.amax(1)
        best = _best_so_far(best, tops)
        found.append(_in_reach(groups, tops, margin.below(best[:, -1]), first))
    best = _best_of_all(best, table.scorers)
    return _kept(_joined(found), margin.below(best[:, -1]), table)


def _fused(rounded: Tensor, table: CentroidTable, margin: Margin, count: int) -> Candidates:
    """As `scan`: maxima of groups of columns first, then the scores of the groups in reach."""
    from trainer.kernels.triton_assign import GROUP, group_maxima, group_scores

    operands = (
        pad(rounded, (0, table.scanned.shape[1] - rounded.shape[1])).contiguous(),
        table.scanned,
        table.offsets,
    )
    tops = group_maxima(*operands)
    best = _best_so_far(margin.fixed.new_full((len(rounded), count), -torch.inf), tops)
    threshold = margin.below(_best_of_all(best, table.scorers)[:, -1])
    rows, groups = (~(tops < threshold[:, None])).nonzero(as_tuple=True)
    found = []
    for row, group in zip(rows.split(_PAIRS), groups.split(_PAIRS), strict=True):
        scores = group_scores(*operands, row, group)
        entry, member = (~(scores < threshold[row, None])).nonzero(as_tuple=True)
        columns = group[entry] * GROUP + member
        found.append(Candidates(row[entry], columns, scores[entry, member]))
    return _kept(_joined(found), threshold, table)


def _best_so_far(best: Tensor, tops: Tensor) -> Tensor:
    """The best `count` maxima of groups, descending. The last is a bound below the count-th best
    score: each of the groups has one at least as good."""
    count = best.shape[1]
    if count == 1:
        return torch.maximum(best, tops.amax(1, keepdim=True).to(best.dtype))
    return torch.cat([best, tops.to(best.dtype)], 1).topk(count, dim=1).values


def _best_of_all(best: Tensor, scorers: Comm) -> Tensor:
    """Over the scorers' slices. What a comparison makes of NaN does not matter: where a score can
    be one, the margin is infinite."""
    if scorers.world_size == 1 or best.shape[1] == 1:
        return scorers.max(best)
    everyone: Tensor = scorers.all_gather(best).view(scorers.world_size, *best.shape)
    return everyone.movedim(0, 1).flatten(1).topk(best.shape[1], dim=1).values


def _members(width: int) -> int:
    """Columns a group has in a tile, at most 32: maxima over less than 128 lanes are slow."""
    members = MEMBERS
    while members > 1 and width < 128 * members:
        members //= 2
    return members


def _in_reach(groups: Tensor, tops: Tensor, threshold: Tensor, first: int) -> Candidates:
    """Candidates of one tile. "Not below" instead of "above": NaN (overflow) stays in."""
    row, group = (~(tops < threshold[:, None])).nonzero(as_tuple=True)
    scores = groups[row, :, group]
    entry, member = (~(scores < threshold[row, None])).nonzero(as_tuple=True)
    columns = first + member * groups.shape[2] + group[entry]
    return Candidates(row[entry], columns, scores[entry, member])


def _joined(found: list[Candidates]) -> Candidates:
    return Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _kept(found: Candidates, threshold: Tensor, table: CentroidTable) -> Candidates:
    """Candidates of earlier tiles against the final threshold; filling and repeats go."""
    keep = ~(found.scores < threshold[found.rows])
    keep &= table.eligible[found.columns]
    return Candidates(*(part[keep] for part in found))
