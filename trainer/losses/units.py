"""Rows scaled to length one, in the two forms that losses need; each is a function of a row alone.

Their last bits differ (one divides, the other multiplies by a reciprocal), so runs keep theirs.
Clusterings have a third, `trainer.cluster.points.unit_rows`, whose sums have a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize


def unit_rows(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Each row scaled to length one, in float32 or better; zero rows stay zero."""
    return normalize(at_least_float32(rows), dim=-1)


def lean_unit_rows(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Each row scaled to length one, in its own precision, for tables that fill the memory.

    Keeps the result and the lengths for the backward pass, and no copy of the input. A zero row
    stays zero and has no gradient.
    """
    result: Tensor = _LeanUnitRows.apply(rows)
    return result


def at_least_float32(rows: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Halves as float32; anything else as it is."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class _LeanUnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
        result = rows * inverse
        ctx.save_for_backward(result, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The part of the gradient along the sphere, over the length."""
        result, inverse = ctx.saved_tensors
        radial = torch.einsum("nd,nd->n", result, gradient)[:, None]
        return torch.addcmul(gradient, result, radial, value=-1).mul_(inverse)
