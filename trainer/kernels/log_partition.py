"""The log-partition of features against constant or learnable rows of any length.

What ProtoCLIP's prototypes need: `prototype_logits` is for unit rows and a fixed scale, here rows
have the lengths of means, the scale is learnt, and there are no positives to leave out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.kernels.tiled import (
    ALL_PAIRS,
    Pairs,
    partition_sums,
    rows_gradient,
    without_invalid,
)
from trainer.kernels.way import BEST_WAY, Way


def log_partition(
    queries: Float[Tensor, "queries dim"],
    scale: Float[Tensor, ""],
    rows: Float[Tensor, "rows dim"],
    *,
    valid: Bool[Tensor, " rows"] | None = None,
    way: Way = BEST_WAY,
) -> Float[Tensor, " queries"]:
    """logsumexp_j(scale * queries . rows_j) over the valid rows; -inf where there is none.

    Differentiable once, in queries, scale and (where they ask for it) rows. On a CPU in their
    dtype: the forward pass carries sum_j p_j rows_j along, which is all that the first two
    gradients need, 4 instead of 6 FLOPs per (query, row, dim); the gradient of the rows recomputes
    the tiles, 4 more. On a GPU by the Triton kernel of `prototype_logits`, with its costs:
    operands, the scale multiplied in, are rounded to the way's dtype; sums are float32 and
    relative to a running maximum.
    """
    value: Tensor = _LogPartition.apply(queries, scale, rows, _How(valid, way))
    return value


class _How(NamedTuple):
    valid: Tensor | None
    way: Way

    def pairs(self, dtype: torch.dtype) -> Pairs:
        return without_invalid(ALL_PAIRS, self.valid, dtype)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, scale: Tensor, rows: Tensor, how: _How) -> Tensor:
        mean = None
        operands = how.way.operands(queries.device)
        if operands is None:
            values = rows if any(ctx.needs_input_grad[:2]) else None
            pairs = how.pairs(queries.dtype)
            sums = partition_sums(
                *(queries, rows, values), scale=scale, pairs=pairs, tile=how.way.tile
            )
            log_total, mean = sums.log_partition, sums.mean
        else:
            log_total = _triton_log_partition(queries * scale, rows, how, operands)
        ctx.how = how
        ctx.save_for_backward(queries, scale, rows, mean, log_total)
        return log_total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not `once_differentiable`: it would let a constant upstream gradient pass silently.
            raise RuntimeError("log_partition has no second derivative; drop create_graph=True")
        queries, scale, rows, mean, log_total = ctx.saved_tensors
        wants_queries, wants_scale, wants_rows, _ = ctx.needs_input_grad
        arguments = (queries, scale, rows, gradients[0], log_total, ctx.how)
        operands = ctx.how.way.operands(queries.device)
        if operands is None:
            pulled = gradients[0][:, None] * mean
            of_rows = _torch_rows(*arguments) if wants_rows else None
        else:
            pulled, of_rows = _triton_gradients(*arguments, operands, wants_rows=wants_rows)
        of_scale = (queries * pulled).sum() if wants_scale else None
        return scale * pulled if wants_queries else None, of_scale, of_rows, None


def _torch_rows(
    queries: Tensor, scale: Tensor, rows: Tensor, gradient: Tensor, log_total: Tensor, how: _How
) -> Tensor:
    return rows_gradient(
        *(queries, rows, gradient * scale, log_total),
        scale=scale,
        pairs=how.pairs(rows.dtype),
        tile=how.way.tile,
    )


def _triton_log_partition(scaled: Tensor, rows: Tensor, how: _How, operands: torch.dtype) -> Tensor:
    from trainer.kernels import triton_logits

    halves = triton_logits.operands(scaled, rows, dtype=operands)
    total = triton_logits.log_negatives(
        *halves, scale=1.0, pairs=how.pairs(torch.float32), sizes=how.way.kernel_sizes
    )
    return total.to(scaled.dtype)


def _triton_gradients(
    queries: Tensor,
    scale: Tensor,
    rows: Tensor,
    gradient: Tensor,
    log_total: Tensor,
    how: _How,
    operands: torch.dtype,
    *,
    wants_rows: bool,
) -> tuple[Tensor, Tensor | None]:
    """sum_j w_ij rows_j, and sum_i w_ij scale queries_i where wanted, w_ij = gradient_i p_ij."""
    from trainer.kernels import triton_logits

    halves = triton_logits.operands(queries * scale, rows, dtype=operands)
    pulled = torch.zeros_like(queries, dtype=torch.float32)
    of_rows = torch.zeros_like(rows, dtype=torch.float32) if wants_rows else None
    triton_logits.write_gradients(
        *(*halves, gradient, log_total),
        dim=queries.shape[1],
        scale=1.0,
        pairs=how.pairs(torch.float32),
        of_queries=pulled,
        of_rows=of_rows,
        sizes=how.way.kernel_sizes,
    )
    return pulled.to(queries.dtype), None if of_rows is None else of_rows.to(rows.dtype)
