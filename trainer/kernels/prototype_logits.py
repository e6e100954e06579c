"""Features against very many learnable rows: the one primitive of the sharded prototype losses.

A loss over prototypes needs two things of its logits: the log of the sum over all negatives, one
number per query, and the few positives themselves. Everything else (margins, cross-entropy or
multi-label forms, sums over ranks) is arithmetic on these. The negatives are streamed in tiles and
never exist as a matrix, in neither direction; positives are left out of the tiles, because
subtracting them from a full sum cancels, and computed one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.kernels.tiled import Pairs, Tile, fixed_reference, partition_sums, rows_gradient

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
    tile: Tile | None = None,
) -> tuple[Float[Tensor, " queries"], Float[Tensor, "queries labels"]]:
    """log sum_j exp(scale * queries . rows_j + bias_j) over the negatives, and queries . positive.

    Unit queries and rows. `positives` are positions in `rows`; -1 where a label is not here, and
    its cosine is zero. The first `num_negatives` rows (None: all) are negatives of each query
    they are no positive of; rows behind them are only ever positives. Without any negative the
    logarithm is -inf. A cosine above `ceiling` counts as a logit of zero without gradient.
    A row may be a positive twice: two cosines, excluded once.

    Differentiable once, in queries and rows. Cost: 4 * queries * rows * dim FLOPs forward where a
    gradient is asked for, else 2, and 4 backward; memory of one tile besides the results.
    """
    num_negatives = rows.shape[0] if num_negatives is None else num_negatives
    pairs = Pairs(
        bias=bias,
        excluded=positives,
        ceiling=None if ceiling is None else scale * ceiling,
        reference=fixed_reference(scale),
    )
    value: tuple[Tensor, Tensor] = _PrototypeLogits.apply(
        queries, rows, positives, scale, num_negatives, pairs, tile
    )
    return value


class _PrototypeLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        rows: Tensor,
        positives: Tensor,
        scale: float,
        num_negatives: int,
        pairs: Pairs,
        tile: Tile | None,
    ) -> tuple[Tensor, Tensor]:
        negatives = rows[:num_negatives]
        values = negatives if ctx.needs_input_grad[0] else None
        sums = partition_sums(queries, negatives, values, scale=scale, pairs=pairs, tile=tile)
        ctx.scale, ctx.num_negatives, ctx.tile = scale, num_negatives, tile
        ctx.pairs = pairs._replace(bias=None, excluded=None)
        log_total = sums.log_partition
        ctx.save_for_backward(queries, rows, positives, pairs.bias, sums.mean, log_total)
        return log_total, pair_products(queries, rows, positives)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("prototype_logits has no second derivative; drop create_graph=True")
        queries, rows, positives, bias, mean, log_total = ctx.saved_tensors
        of_queries, of_rows = None, None
        scaled_gradient = gradients[0] * ctx.scale
        if ctx.needs_input_grad[0]:
            of_queries = scaled_gradient[:, None] * mean
        if ctx.needs_input_grad[1]:
            of_rows = torch.zeros_like(rows)
            rows_gradient(
                queries,
                rows[: ctx.num_negatives],
                scaled_gradient,
                log_total,
                scale=ctx.scale,
                pairs=ctx.pairs._replace(bias=bias, excluded=positives),
                tile=ctx.tile,
                out=of_rows[: ctx.num_negatives],
            )
        add_pair_gradients(
            queries, rows, positives, gradients[1], of_queries=of_queries, of_rows=of_rows
        )
        return of_queries, of_rows, None, None, None, None, None


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
    for some in _pair_blocks(positions, queries.shape[1]):
        places = positions[some].clamp_min(0)
        if of_queries is not None:
            of_queries[some] += torch.einsum("ql,qld->qd", gradient[some], rows[places])
        if of_rows is not None:
            pulled = gradient[some, :, None] * queries[some, None, :]
            of_rows.index_add_(0, places.flatten(), pulled.flatten(0, 1))


def _pair_blocks(positions: Tensor, dim: int) -> list[slice]:
    size = max(1, PAIR_ELEMENTS // max(1, positions.shape[1] * dim))
    count = positions.shape[0] if positions.shape[1] else 0
    return [slice(first, first + size) for first in range(0, count, size)]
