"""Collectives as functions with exact adjoints: what `Comm` differentiates.

The adjoint of "everybody gets everything" is "everybody gets the sum of what the others say about
its part", and the reverse; the adjoint of a sum is a sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def _gathered(rows: Tensor, group: Group, world_size: int) -> Tensor:
    rows = rows.contiguous()
    result = rows.new_empty((world_size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_single(result, rows, group=group)
    return result


def _scattered(rows: Tensor, group: Group, world_size: int) -> Tensor:
    if rows.shape[0] % world_size:
        raise ValueError(f"{rows.shape[0]} rows do not split over {world_size} ranks")
    result = rows.new_empty((rows.shape[0] // world_size, *rows.shape[1:]))
    dist.reduce_scatter_single(result, rows.contiguous(), group=group)
    return result


def _summed(value: Tensor, group: Group) -> Tensor:
    result = value.clone().contiguous()
    dist.all_reduce(result, group=group)
    return result


class AllGather(torch.autograd.Function):
    """[n, ...] of each rank -> [W * n, ...] on all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, world_size: int) -> Tensor:
        ctx.ranks = group, world_size
        return _gathered(rows, group, world_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(gradients[0], *ctx.ranks), None, None


class ReduceScatter(torch.autograd.Function):
    """[W * n, ...] of each rank -> the sum's [n, ...] of this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, world_size: int) -> Tensor:
        ctx.ranks = group, world_size
        return _scattered(rows, group, world_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradients[0], *ctx.ranks), None, None


class Sum(torch.autograd.Function):
    """The sum over ranks, on all."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(value, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None
