"""Near-duplicates: samples that lie within a small angle of an earlier one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from trainer.cluster.points import Chosen, Points, unit_rows
from trainer.cluster.ranks.exchange import exchanged
from trainer.cluster.ranks.together import together
from trainer.cluster.search.assign import ROW_BLOCK, assign_block, prepare
from trainer.cluster.start.drawn import lexicographic, smallest_hashes
from trainer.comm import Comm
from trainer.hashing import key_of

_SAMPLES_PER_CELL = 1000
_MOST_CELLS = 100_000
_CELLS_AT_ONCE = 64
_TILE = 1024


def without_duplicates(points: Points, min_cosine: float, comm: Comm, *, seed: int) -> Points:
    """The points that have no near-duplicate of a lower id; every rank keeps some of its own.

    Two samples are near-duplicates if the cosine of their vectors is at least `min_cosine`, or if
    both vectors are zero. Only
    samples whose nearest cell is the same are compared: points drawn by hash, one of a thousand,
    are the cells' centres, and a pair with a border between them is missed.
    """
    cells, num_cells = _cells(points, comm, seed)
    dropped = torch.zeros(len(points), dtype=torch.bool)
    chunks = exchanged(points, cells, num_cells, comm, cells_at_once=_CELLS_AT_ONCE)
    for chunk in chunks:
        late = torch.zeros(len(chunk.ids), dtype=torch.bool, device=comm.device)
        for cell in chunk.my_cells:
            members = (chunk.cells == cell).nonzero()[:, 0]
            rows, ids = chunk.rows[members], chunk.ids[members]
            order = lexicographic(ids, rows)
            late[members[order]] = repeats(unit_rows(rows[order]), min_cosine)
        mine, _ = comm.exchange(late, chunk.counts)
        dropped[chunk.places[mine.cpu()]] = True
    return Chosen(points, (~dropped).nonzero()[:, 0])


def repeats(rows: Float[Tensor, "n d"], min_cosine: float) -> Bool[Tensor, " n"]:
    """True for unit rows that have an earlier row at a cosine of at least `min_cosine`, and for
    zero rows that have an earlier one."""
    zero = (rows == 0).all(dim=1)
    found = zero & (zero.cumsum(0) > 1)
    for first in range(0, rows.shape[0], _TILE):
        tile = rows[first : first + _TILE]
        for begin in range(0, first + 1, _TILE):
            near = tile @ rows[begin : begin + _TILE].T >= min_cosine
            if begin == first:
                near = near.tril(-1)
            found[first : first + _TILE] |= near.any(1)
    return found


def _cells(points: Points, comm: Comm, seed: int) -> tuple[Int64[Tensor, " n"], int]:
    """The cell of each local point, and how many cells there are."""
    total = int(comm.sum(torch.tensor([len(points)], device=comm.device)))
    count = min(max(total // _SAMPLES_PER_CELL, 1), _MOST_CELLS)
    _, places = smallest_hashes(points, count, key_of(seed, "duplicates"), comm)
    centres = comm.gather_rows(unit_rows(points.take(places)).to(comm.device))
    centres = centres[lexicographic(torch.zeros(len(centres), device=comm.device), centres)]
    table = prepare(centres)
    cells = torch.empty(len(points), dtype=torch.int64)
    for step in together(points, ROW_BLOCK, comm):
        cells[step.place] = assign_block(unit_rows(step.points), table).cpu()
    return cells, len(centres)
