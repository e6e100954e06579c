"""Penalties on how often coordinates are used: against words, or prototypes, that say everything.

Rows are not negative, and their mean over the batch says how often a coordinate is used. Both
penalties are of the mean over all ranks' rows: a mean of the ranks' penalties would be another
number, and depend on how many ranks there are.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from trainer.comm import Comm
from trainer.losses.units import at_least_float32

UsageKind = Literal["overuse", "flops"]


def usage_penalty(
    rows: Float[Tensor, "rows words"], comm: Comm, *, kind: UsageKind = "overuse"
) -> Float[Tensor, ""]:
    """With u_j the mean of column j over all ranks' rows, and V columns:

    `overuse`: V sum_j u_j^3 / sum_j u_j, which is 1 for uniform unit rows and V where all rows are
    one and the same word (LexVLA, equation 8). `flops`: sum_j u_j^2, the expected cost of a product
    of two sparse rows, blind to which words it is spent on. Equal on all ranks, in float32 or
    better. Every rank has equally many rows.
    """
    used = comm.sum(at_least_float32(rows).sum(dim=0)) / (rows.shape[0] * comm.world_size)
    if kind == "flops":
        return used.square().sum()
    tiny = 1e-30  # rows without any use: the penalty is then 0
    return used.shape[0] * used.pow(3).sum() / used.sum().clamp_min(tiny)


def warm_up(step: int, steps: int) -> float:
    """min(1, t / steps)^2 for a penalty's weight; 1 where `steps` is 0."""
    return min(1.0, step / steps) ** 2 if steps else 1.0
