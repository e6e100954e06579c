"""Features against very many learnable rows: the one primitive of the sharded prototype losses.

A loss over prototypes needs two things of its logits: the log of the sum over all negatives, one
number per query, and the few positives themselves. Everything else (margins, cross-entropy or
multi-label forms, sums over ranks) is arithmetic on these. The negatives are streamed in tiles and
never exist as a matrix, in neither direction; positives are left out of the tiles, because
subtracting them from a full sum cancels, and computed one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.kernels.tiled import Pairs, fixed_reference, partition_sums, rows_gradient
from trainer.kernels.way import BEST_WAY, Way

PAIR_ELEMENTS = 1 << 22
"""Rows gathered for positives at a time, in numbers: 16 MB in float32."""


def prototype_logits(
    queries: Float[Tensor, "queries dim"],
    rows: Float[Tensor, "rows dim"],
    positives: Int64[Tensor, "queries labels"],
    *,
    scale: float,
    num_negatives: int | None = None,
    bias: Float[Tensor, " negatives"] | None = None,
    ceiling: float | None = None,
    way: Way = BEST_WAY,
) -> tuple[Float[Tensor, " queries"], Float[Tensor, "queries labels"]]:
    """log sum_j exp(scale * queries . rows_j + bias_j) over the negatives, and queries . positive.

    Unit queries and rows. `positives` are positions in `rows`; -1 where a label is not here, and
    its cosine is zero. The first `num_negatives` rows (None: all) are negatives of each query
    they are no positive of; rows behind them are only ever positives. Without any negative the
    logarithm is -inf. A cosine above `ceiling` counts as a logit of zero without gradient.
    A row may be a positive twice: two cosines, excluded once.

    Differentiable once, in queries and rows. On a CPU in their dtype: 4 * queries * rows * dim
    FLOPs forward where a gradient is asked for, else 2, and 4 backward, and memory of one tile
    besides the results. On a GPU by a Triton kernel: 2 FLOPs forward and 4 backward, where the way
    lets 2 * queries * rows bytes be kept; else 6 backward, and a scratch of some thousand queries
    by rows in halves. Positives are in the inputs' dtype everywhere. Two runs have
    equal bits unless the way has timed sizes.
    """
    num_negatives = rows.shape[0] if num_negatives is None else num_negatives
    pairs = Pairs(
        bias=bias,
        excluded=positives,
        ceiling=None if ceiling is None else scale * ceiling,
        reference=fixed_reference(scale),
    )
    how = _How(scale, num_negatives, pairs, way)
    value: tuple[Tensor, Tensor] = _PrototypeLogits.apply(queries, rows, positives, how)
    return value


class _How(NamedTuple):
    scale: float
    num_negatives: int
    pairs: Pairs
    way: Way


class _PrototypeLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, rows: Tensor, positives: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        negatives, mean, kept = rows[: how.num_negatives], None, None
        operands = how.way.operands(queries.device)
        if operands is None:
            values = negatives if ctx.needs_input_grad[0] else None
            sums = partition_sums(
                *(queries, negatives, values), scale=how.scale, pairs=how.pairs, tile=how.way.tile
            )
            log_total, mean = sums.log_partition, sums.mean
        else:
            keep = any(ctx.needs_input_grad[:2])
            log_total, kept = _triton_log_negatives(queries, negatives, how, operands, keep=keep)
        ctx.how = how._replace(pairs=how.pairs._replace(bias=None, excluded=None))
        ctx.save_for_backward(queries, rows, positives, how.pairs.bias, mean, kept, log_total)
        return log_total, pair_products(queries, rows, positives)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("prototype_logits has no second derivative; drop create_graph=True")
        queries, rows, positives, bias, mean, kept, log_total = ctx.saved_tensors
        how: _How = ctx.how._replace(pairs=ctx.how.pairs._replace(bias=bias, excluded=positives))
        scaled_gradient = gradients[0] * how.scale
        of_queries = torch.zeros_like(queries) if ctx.needs_input_grad[0] else None
        of_rows = torch.zeros_like(rows) if ctx.needs_input_grad[1] else None
        arguments = (queries, rows, scaled_gradient, log_total, of_queries, of_rows, how)
        operands = how.way.operands(queries.device)
        if operands is None:
            _torch_gradients(mean, *arguments)
        else:
            _triton_gradients(kept, *arguments, operands)
        add_pair_gradients(
            queries, rows, positives, gradients[1], of_queries=of_queries, of_rows=of_rows
        )
        return of_queries, of_rows, None, None


def _torch_gradients(
    mean: Tensor,
    queries: Tensor,
    rows: Tensor,
    gradient: Tensor,
    log_total: Tensor,
    of_queries: Tensor | None,
    of_rows: Tensor | None,
    how: _How,
) -> None:
    if of_queries is not None:
        torch.mul(gradient[:, None], mean, out=of_queries)
    if of_rows is not None:
        rows_gradient(
            *(queries, rows[: how.num_negatives], gradient, log_total),
            scale=how.scale,
            pairs=how.pairs,
            tile=how.way.tile,
            out=of_rows[: how.num_negatives],
        )


def _triton_log_negatives(
    queries: Tensor, negatives: Tensor, how: _How, operands: torch.dtype, *, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The sums' logarithms, and the exponentials, where a fixed reference lets them be kept."""
    from trainer.kernels import triton_logits

    halves = triton_logits.operands(queries, negatives, dtype=operands)
    kept = None
    if keep and how.pairs.reference is not None:
        most = how.way.kept_gib * 2**30
        kept = triton_logits.room_to_keep(*halves, most_bytes=most)
    total = triton_logits.log_negatives(
        *halves, scale=how.scale, pairs=how.pairs, kept=kept, sizes=how.way.kernel_sizes
    )
    return total.to(queries.dtype), kept


def _triton_gradients(
    kept: Tensor | None,
    queries: Tensor,
    rows: Tensor,
    gradient: Tensor,
    log_total: Tensor,
    of_queries: Tensor | None,
    of_rows: Tensor | None,
    how: _How,
    operands: torch.dtype,
) -> None:
    from trainer.kernels import triton_logits

    negatives = rows[: how.num_negatives]
    of_negatives = None if of_rows is None else of_rows[: how.num_negatives]
    if kept is not None:
        # As precise as what the sums were made of.
        halves = [tensor.to(operands) for tensor in (queries, negatives)]
        triton_logits.write_kept_gradients(
            *(*halves, gradient, log_total, kept),
            reference=how.pairs.reference or 0.0,
            of_queries=of_queries,
            of_rows=of_negatives,
        )
        return
    triton_logits.write_gradients(
        *(*triton_logits.operands(queries, negatives, dtype=operands), gradient, log_total),
        dim=queries.shape[1],
        scale=how.scale,
        pairs=how.pairs,
        of_queries=of_queries,
        of_rows=of_negatives,
        sizes=how.way.kernel_sizes,
    )


def pair_products(
    queries: Float[Tensor, "queries dim"],
    rows: Float[Tensor, "rows dim"],
    positions: Int64[Tensor, "queries labels"],
) -> Float[Tensor, "queries labels"]:
    """queries_i . rows[positions_ik]; zero where the position is negative.

    Gathers a block of rows at a time: all of them at once can be larger than the table.
    """
    result = queries.new_zeros(positions.shape)
    if not rows.shape[0]:
        return result
    for some in _pair_blocks(positions, queries.shape[1]):
        chosen = rows[positions[some].clamp_min(0)]
        result[some] = torch.einsum("qd,qld->ql", queries[some], chosen)
    return result.masked_fill_(positions < 0, 0.0)


def add_pair_gradients(
    queries: Float[Tensor, "queries dim"],
    rows: Float[Tensor, "rows dim"],
    positions: Int64[Tensor, "queries labels"],
    gradient: Float[Tensor, "queries labels"],
    *,
    of_queries: Float[Tensor, "queries dim"] | None,
    of_rows: Float[Tensor, "rows dim"] | None,
) -> None:
    """Adds the gradients of `pair_products` to the tensors given, in place."""
    if not rows.shape[0]:
        return
    gradient = gradient.masked_fill(positions < 0, 0.0)
    # Zeros of absent positives go to many rows: to one, a device would add them one by one.
    spread = torch.arange(positions.numel(), device=positions.device).view_as(positions)
    absorbing = torch.where(positions < 0, spread % rows.shape[0], positions)
    for some in _pair_blocks(positions, queries.shape[1]):
        if of_queries is not None:
            chosen = rows[positions[some].clamp_min(0)]
            of_queries[some] += torch.einsum("ql,qld->qd", gradient[some], chosen)
        if of_rows is not None:
            pulled = gradient[some, :, None] * queries[some, None, :]
            _add_at(of_rows, absorbing[some].flatten(), pulled.flatten(0, 1))


def _add_at(rows: Tensor, positions: Tensor, values: Tensor) -> None:
    """rows[positions] += values, a position as often as it occurs, and always in the same order:
    each of torch's two ways has one on one kind of device."""
    if rows.is_cuda:
        rows.index_put_((positions,), values, accumulate=True)
    else:
        rows.index_add_(0, positions, values)


def _pair_blocks(positions: Tensor, dim: int) -> list[slice]:
    size = max(1, PAIR_ELEMENTS // max(1, positions.shape[1] * dim))
    count = positions.shape[0] if positions.shape[1] else 0
    return [slice(first, first + size) for first in range(0, count, size)]
