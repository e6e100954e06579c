"""Softmax statistics over very many rows, tile by tile, in plain torch.

The CPU path of the prototype losses and, in float64, the reference for kernels on GPUs. No tensor
of (queries x rows) elements exists: the largest intermediate is one tile, whatever the sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tile = tuple[int, int]
"""Queries and rows of one tile of logits."""

CPU_TILE: Tile = (512, 1024)
"""Two MB in float32: a tile stays in the cache between the product, the exponential and the sum."""
ACCELERATOR_TILE: Tile = (8192, 4096)
"""Enough work per launch; 128 MB in float32."""


class Partition(NamedTuple):
    """What some of the rows contribute to a softmax over all of them; `merge` joins two of these.

    Sums are relative to `peak`, so they neither overflow nor vanish at any scale.
    """

    peak: Float[Tensor, " queries"]
    """Largest logit; -inf where there is no row."""
    mass: Float[Tensor, " queries"]
    """sum_j exp(logit_j - peak)"""
    weighted: Float[Tensor, "queries width"]
    """sum_j exp(logit_j - peak) value_j; no columns where no values were given."""

    @property
    def log_partition(self) -> Float[Tensor, " queries"]:
        """logsumexp_j(logit_j); -inf where there is no row."""
        return self.peak + self.mass.log()

    @property
    def mean(self) -> Float[Tensor, "queries width"]:
        """The values averaged under the softmax; zero where there is no row."""
        tiny = torch.finfo(self.mass.dtype).tiny
        return self.weighted / self.mass.clamp_min(tiny)[:, None]


def finite(peak: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The peak as something to subtract: -inf - -inf would be NaN."""
    return peak.clamp_min(torch.finfo(peak.dtype).min)


def merge(one: Partition, other: Partition) -> Partition:
    """The statistics of two disjoint sets of rows together. Associative, order does not matter."""
    peak = torch.maximum(one.peak, other.peak)
    first, second = (one.peak - finite(peak)).exp(), (other.peak - finite(peak)).exp()
    return Partition(
        peak,
        one.mass * first + other.mass * second,
        one.weighted * first[:, None] + other.weighted * second[:, None],
    )


def partition_sums(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "rows dim"],
    values: Float[Tensor, "rows width"] | None = None,
    *,
    scale: Float[Tensor, ""] | float,
    valid: Bool[Tensor, " rows"] | None = None,
    tile: Tile | None = None,
) -> Partition:
    """Softmax statistics of the logits `scale * queries @ keys.T`, and of `values` under them.

    Equals `logsumexp(logits)` and `softmax(logits) @ values` for the matrix that is never built.
    Rows that are not valid do not exist. Not differentiable; accumulates in the inputs' dtype.

    Cost: 2 * queries * rows * (dim + width) FLOPs; memory of one tile besides the results.
    """
    num_queries, num_rows = tile or _default_tile(queries)
    values = keys[:, :0] if values is None else values
    bias = _mask_bias(valid, queries.dtype)
    chunks = [
        _over_rows(chunk, keys, values, bias=bias, num_rows=num_rows)
        for chunk in (queries.detach() * scale).split(num_queries)
    ]
    return Partition(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _default_tile(queries: Tensor) -> Tile:
    return CPU_TILE if queries.device.type == "cpu" else ACCELERATOR_TILE


def _over_rows(
    scaled: Tensor, keys: Tensor, values: Tensor, *, bias: Tensor | None, num_rows: int
) -> Partition:
    total = Partition(
        scaled.new_full((scaled.shape[0],), -torch.inf),
        scaled.new_zeros(scaled.shape[0]),
        scaled.new_zeros(scaled.shape[0], values.shape[1]),
    )
    for first in range(0, keys.shape[0], num_rows):
        part = slice(first, first + num_rows)
        logits = _tile_logits(scaled, keys[part], None if bias is None else bias[part])
        peak = logits.amax(dim=1)
        weights = logits.sub_(finite(peak)[:, None]).exp_()
        total = merge(total, Partition(peak, weights.sum(dim=1), weights @ values[part]))
    return total


def _tile_logits(scaled: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    return scaled @ keys.T if bias is None else torch.addmm(bias, scaled, keys.T)


def _mask_bias(valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Zero for a row that counts, -inf for one that doesn't: the mask rides on the product."""
    if valid is None:
        return None
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(
        ~valid, -torch.inf
    )


def log_partition(
    queries: Float[Tensor, "queries dim"],
    scale: Float[Tensor, ""],
    rows: Float[Tensor, "rows dim"],
    *,
    valid: Bool[Tensor, " rows"] | None = None,
    tile: Tile | None = None,
) -> Float[Tensor, " queries"]:
    """logsumexp_j(scale * queries . rows_j) over the valid rows; -inf where there is none.

    Differentiable once, in queries, scale and (where they ask for it) rows. The forward pass
    carries sum_j p_j rows_j along, which is all that the first two gradients need: 4 instead of 6
    FLOPs per (query, row, dim). The gradient of the rows recomputes the tiles, 4 more.
    """
    value: Tensor = _LogPartition.apply(queries, scale, rows, valid, tile)
    return value


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        scale: Tensor,
        rows: Tensor,
        valid: Tensor | None,
        tile: Tile | None,
    ) -> Tensor:
        values = rows if any(ctx.needs_input_grad[:2]) else None
        sums = partition_sums(queries, rows, values, scale=scale, valid=valid, tile=tile)
        ctx.tile = tile or _default_tile(queries)
        ctx.save_for_backward(queries, scale, rows, valid, sums.mean, sums.log_partition)
        return sums.log_partition

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not `once_differentiable`: it would let a constant upstream gradient pass silently.
            raise RuntimeError("log_partition has no second derivative; drop create_graph=True")
        queries, scale, rows, valid, mean, log_total = ctx.saved_tensors
        wants_queries, wants_scale, wants_rows, *_ = ctx.needs_input_grad
        pulled = gradients[0][:, None] * mean
        of_rows = None
        if wants_rows:
            scaled, bias = queries * scale, _mask_bias(valid, rows.dtype)
            of_rows = _rows_gradient(scaled, rows, gradients[0], log_total, bias, ctx.tile)
        of_scale = (queries * pulled).sum() if wants_scale else None
        return scale * pulled if wants_queries else None, of_scale, of_rows, None, None


def _rows_gradient(
    scaled: Tensor,
    rows: Tensor,
    gradient: Tensor,
    log_total: Tensor,
    bias: Tensor | None,
    tile: Tile,
) -> Tensor:
    """sum_i gradient_i p_ij scaled_i for each row j, from recomputed tiles."""
    result = torch.zeros_like(rows)
    for first in range(0, rows.shape[0], tile[1]):
        part = slice(first, first + tile[1])
        for start in range(0, scaled.shape[0], tile[0]):
            some = slice(start, start + tile[0])
            logits = _tile_logits(scaled[some], rows[part], None if bias is None else bias[part])
            weights = logits.sub_(finite(log_total[some])[:, None]).exp_()
            result[part] += weights.mul_(gradient[some, None]).T @ scaled[some]
    return result
