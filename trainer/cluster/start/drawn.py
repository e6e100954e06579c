"""Where k-means starts: the same for every number of ranks."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from trainer.cluster.points import Points, stream_ids
from trainer.cluster.problem import Problem
from trainer.comm import Comm
from trainer.hashing import hash_bits, key_of

_IDS_AT_ONCE = 1 << 20
_DIGITS = 1 << 16


def starting_points(problem: Problem, restart: int) -> Float[Tensor, "k d"]:
    """The K points whose ids have the smallest hash, in order of the hash."""
    clusters, comm = problem.config.clusters, problem.comm
    key = key_of(problem.config.seed, "kmeans start", restart)
    bits, places = smallest_hashes(problem.points, clusters, key, comm)
    rows = comm.gather_rows(problem.points.take(places).to(comm.device, torch.float32))
    order = lexicographic(comm.gather_rows(bits.to(comm.device)), rows)
    return rows[order[:clusters]]


def smallest_hashes(
    points: Points, count: int, key: int, comm: Comm
) -> tuple[Int64[Tensor, " own"], Int64[Tensor, " own"]]:
    """Hash and place of this rank's part of the `count` points with the smallest hashes.

    More if ids are given twice: all points of the last hash belong.
    """
    kept = torch.zeros(0, dtype=torch.int64)
    places = torch.zeros(0, dtype=torch.int64)
    limit = torch.iinfo(torch.int64).max
    for span, ids in stream_ids(points, _IDS_AT_ONCE):
        bits = hash_bits(ids.cpu(), key)
        inside = (bits <= limit).nonzero()[:, 0]
        kept, places = torch.cat([kept, bits[inside]]), torch.cat([places, span.start + inside])
        if len(kept) > count:
            limit = int(kept.kthvalue(count).values)
            kept, places = kept[kept <= limit], places[kept <= limit]
    chosen = kept <= kth_smallest(kept, count, comm)
    return kept[chosen], places[chosen]


def kth_smallest(values: Int64[Tensor, " n"], count: int, comm: Comm) -> int:
    """The `count`-th smallest of all ranks' values together; the largest, if they are fewer.

    Digit after digit, by counts of each: sends 2 MiB a rank, however many values there are.
    """
    total = int(comm.sum(torch.tensor([len(values)], device=comm.device)))
    left, found = min(count, total) - 1, 0
    for shift in (48, 32, 16, 0):
        digits = values >> shift
        digits = digits + _DIGITS // 2 if shift == 48 else digits & (_DIGITS - 1)
        counts = comm.sum(torch.bincount(digits, minlength=_DIGITS).to(comm.device)).cpu()
        ends = counts.cumsum(0)
        digit = int(torch.searchsorted(ends, left, right=True))
        left -= int(ends[digit] - counts[digit])
        values = values[digits == digit]
        found = found << 16 | (digit - _DIGITS // 2 if shift == 48 else digit)
    return found


def lexicographic(keys: Shaped[Tensor, " n"], rows: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
    """Order by key; equal keys (an id given twice) by the row's values, wherever the row was."""
    order = torch.argsort(keys, stable=True)
    if torch.unique(keys).numel() < keys.numel():
        order = torch.arange(keys.shape[0], device=keys.device)
        for column in reversed(range(rows.shape[1])):
            order = order[torch.argsort(rows[order, column], stable=True)]
        order = order[torch.argsort(keys[order], stable=True)]
    return order
