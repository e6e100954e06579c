"""Bringing points of one group together, wherever they are; a few groups at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.points import Points
from trainer.comm import Comm


class Chunk(NamedTuple):
    """All points, of all ranks, of the cells that this rank works on."""

    my_cells: range
    cells: Int64[Tensor, " n"]
    ids: Int64[Tensor, " n"]
    rows: Float[Tensor, "n d"]
    counts: Sequence[int]
    """Points that came from each rank, in their order; what is found of them goes back by it."""
    places: Int64[Tensor, " own"]
    """Which of its own points this rank has sent, in the order in which answers come back."""


def exchanged(
    points: Points,
    cells: Int64[Tensor, " n"],
    num_cells: int,
    comm: Comm,
    *,
    cells_at_once: int = 1,
) -> Iterator[Chunk]:
    """Chunk by chunk of `cells_at_once` cells a rank, in order of the cell.

    `cells` is the cell of each local point. Each point is read, and sent to one rank, once.
    """
    order = torch.argsort(cells, stable=True).cpu()
    ends = [0, *torch.bincount(cells.cpu(), minlength=num_cells).cumsum(0).tolist()]
    ids = points.ids(0, len(points)).cpu()
    for first in range(0, num_cells, cells_at_once * comm.world_size):
        borders = [
            min(first + rank * cells_at_once, num_cells) for rank in range(comm.world_size + 1)
        ]
        places = order[ends[borders[0]] : ends[borders[-1]]]
        counts = [ends[last] - ends[begin] for begin, last in pairwise(borders)]
        rows, sizes = comm.exchange(points.take(places).to(comm.device, torch.float32), counts)
        yield Chunk(
            my_cells=range(borders[comm.rank], borders[comm.rank + 1]),
            cells=comm.exchange(cells[places].to(comm.device), counts)[0],
            ids=comm.exchange(ids[places].to(comm.device), counts)[0],
            rows=rows,
            counts=sizes,
            places=places,
        )
