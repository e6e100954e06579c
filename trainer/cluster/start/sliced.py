"""Where k-means starts on a grid of ranks: as elsewhere, but no rank holds all of it."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.problem import Problem
from trainer.cluster.start.drawn import lexicographic, smallest_hashes
from trainer.comm import Comm
from trainer.hashing import key_of

_ROWS_AT_ONCE = 1 << 16


def held_starting_points(problem: Problem, restart: int) -> Float[Tensor, "held d"]:
    """The rows that this rank holds of `starting_points`.

    Every row is sent to all ranks once, some ten thousand at a time, and kept where it is held.
    """
    comm, held = problem.comm, problem.grid.held
    key = key_of(problem.config.seed, "kmeans start", restart)
    bits, places = smallest_hashes(problem.points, problem.config.clusters, key, comm)
    rows = problem.points.take(places).to(comm.device, torch.float32)
    numbers = places_in_order(bits.to(comm.device), rows, comm)
    start = rows.new_empty(held.stop - held.start, problem.points.dim)
    for first in range(0, problem.config.clusters, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, problem.config.clusters)
        chosen = (numbers >= first) & (numbers < last)
        part = rows.new_empty(last - first, problem.points.dim)
        part[comm.gather_rows(numbers[chosen]) - first] = comm.gather_rows(rows[chosen])
        low, high = max(first, held.start), min(last, held.stop)
        if low < high:
            start[low - held.start : high - held.start] = part[low - first : high - first]
    return start


def places_in_order(
    keys: Int64[Tensor, " n"], rows: Float[Tensor, "n d"], comm: Comm
) -> Int64[Tensor, " n"]:
    """Where each of this rank's rows stands in `lexicographic` order of all ranks' rows.

    Only rows whose keys are equal (an id given twice) are sent.
    """
    everyone = comm.gather_rows(keys)
    values, counts = everyone.unique(return_counts=True)
    numbers: Tensor = (counts.cumsum(0) - counts)[torch.searchsorted(values, keys)]
    tied = torch.isin(keys, values[counts > 1])
    tied_keys, tied_rows = comm.gather_rows(keys[tied]), comm.gather_rows(rows[tied])
    order = lexicographic(tied_keys, tied_rows)
    first = torch.searchsorted(tied_keys[order].contiguous(), tied_keys)
    offsets = torch.empty_like(order)
    offsets[order] = torch.arange(len(order), device=order.device)
    begin = sum(comm.gather_json(int(tied.sum()))[: comm.rank])
    numbers[tied] += (offsets - first)[begin : begin + int(tied.sum())]
    return numbers
