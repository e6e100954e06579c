"""Bringing points of one group together, wherever they are; a few groups at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.points import Points
from trainer.comm import Comm


class Chunk(NamedTuple):
    """All points, of all ranks, of some cells."""

    my_cells: range
    """The cells that this rank works on."""
    cells: Int64[Tensor, " n"]
    ids: Int64[Tensor, " n"]
    rows: Float[Tensor, "n d"]
    mine: slice
    """Where this rank's own points are among them."""
    places: Int64[Tensor, " own"]
    """And which they are."""


def exchanged(
    points: Points,
    cells: Int64[Tensor, " n"],
    num_cells: int,
    comm: Comm,
    *,
    cells_at_once: int = 1,
) -> Iterator[Chunk]:
    """Chunk by chunk of `cells_at_once` cells a rank, in order of the cell; every rank gets all.

    `cells` is the cell of each local point. Each point is read, and sent, once.
    """
    order = torch.argsort(cells, stable=True).cpu()
    ends = torch.bincount(cells.cpu(), minlength=num_cells).cumsum(0)
    ids = points.ids(0, len(points)).cpu()
    step = cells_at_once * comm.world_size
    for first in range(0, num_cells, step):
        last = min(first + step, num_cells)
        places = order[int(ends[first - 1]) if first else 0 : int(ends[last - 1])]
        counts = [int(count) for count in comm.gather_json(len(places))]
        begin = sum(counts[: comm.rank])
        low = min(first + comm.rank * cells_at_once, last)
        yield Chunk(
            my_cells=range(low, min(low + cells_at_once, last)),
            cells=comm.gather_rows(cells[places].to(comm.device)),
            ids=comm.gather_rows(ids[places].to(comm.device)),
            rows=comm.gather_rows(points.take(places).to(comm.device, torch.float32)),
            mine=slice(begin, begin + len(places)),
            places=places,
        )
