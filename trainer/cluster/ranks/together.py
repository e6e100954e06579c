"""Passes over all ranks' points, taken by groups of ranks at the same pace.

A pass ends on all ranks or on none: where one can't read its points, its group stops with the next
block, and after the pass, in one small collective, all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.cluster.points import Points, stream
from trainer.comm import Comm, stop_together
from trainer.errors import TrainerError

_FAILED = -1


class Round(NamedTuple):
    """A block of each of the scorers, on all of them."""

    points: Float[Tensor, "n d"]
    """All of the scorers' blocks, in the order of the ranks."""
    mine: slice
    """Where this rank's block is among them..."""
    place: slice
    """...and in its points. Both are empty once its points are used up."""


def together(
    points: Points, size: int, comm: Comm, *, scorers: Comm | None = None
) -> Iterator[Round]:
    """All points, in blocks of at most `size` a rank; every rank must call and go to the end.

    The ranks of a group of `scorers` (None: each for itself) get their blocks at the same time.
    DataError on all ranks of `comm` where one fails to read.
    """
    failure = None
    try:
        yield from rounds(stream(points, size, comm.device), points.dim, scorers or Comm.solo())
    except (TrainerError, OSError) as error:
        failure = str(error)
    stop_together(comm, failure)


def rounds(blocks: Iterator[tuple[slice, Tensor]], dim: int, scorers: Comm) -> Iterator[Round]:
    """Each rank's blocks with those of the other scorers, until all have none left.

    Ends early, without an error, where another rank fails: ask all ranks afterwards.
    """
    if scorers.world_size == 1:
        for place, block in blocks:
            yield Round(block, slice(0, len(block)), place)
        return
    nothing = (slice(0, 0), torch.zeros(0, dim, device=scorers.device))
    while True:
        try:
            place, block = next(blocks, nothing)
        except (TrainerError, OSError):
            _sizes(_FAILED, scorers)
            raise
        sizes = _sizes(len(block), scorers)
        if min(sizes) == _FAILED or max(sizes) == 0:
            return
        first = sum(sizes[: scorers.rank])
        try:
            yield Round(_gathered(block, sizes, scorers), slice(first, first + len(block)), place)
        except GeneratorExit:  # whoever uses the blocks has failed
            _sizes(_FAILED, scorers)
            raise


def _sizes(own: int, scorers: Comm) -> list[int]:
    found: list[int] = scorers.all_gather(torch.tensor([own], device=scorers.device)).tolist()
    return found


def _gathered(block: Tensor, sizes: list[int], scorers: Comm) -> Tensor:
    filled = block.new_zeros(max(sizes), block.shape[1])
    filled[: len(block)] = block
    parts = scorers.all_gather(filled).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
