"""Rows that a loss may read without teaching the tower behind them, or only to unlearn it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def scaled_gradient(
    rows: Float[Tensor, "batch dim"], factor: Float[Tensor, ""]
) -> Float[Tensor, "batch dim"]:
    """`rows` themselves, whose gradient is `factor` times that of the result.

    A factor below zero is gradient reversal (Ganin and Lempitsky, arXiv 1409.7495): a head learns
    to tell groups apart, and the rows learn that it can't.
    """
    result: Tensor = _ScaledGradient.apply(rows, factor)
    return result


class _ScaledGradient(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor.to(gradient.dtype), None
