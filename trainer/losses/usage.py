"""Penalties on how often coordinates are used: against words, or prototypes, that say everything.

Rows are not negative, and their mean over the batch says how often a coordinate is used. Both
penalties are of the mean over all ranks' rows: a mean of the ranks' penalties would be another
number, and depend on how many ranks there are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.comm import Comm
from trainer.kernels.log_partition import log_partition
from trainer.kernels.tiled import finite
from trainer.losses.units import at_least_float32

UsageKind = Literal["overuse", "flops"]
BLOCK_SCORES = 1 << 25
"""Of samples and prototypes that exist at one time: 128 MiB in float32."""


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


def prototype_overuse(
    queries: Float[Tensor, "samples dim"],
    rows: Float[Tensor, "local dim"],
    scale: Float[Tensor, ""],
    comm: Comm,
    *,
    valid: Bool[Tensor, " local"] | None = None,
) -> Float[Tensor, ""]:
    """`overuse` of K prototypes by samples that choose softly among them:

        K^2 sum_j u_j^3 / sum_j u_j,    u_j = mean_i softmax_j(scale queries_i . rows_j)

    which is 1 where all are used equally and K^2 where one has everything. `queries` are all
    ranks' samples, equal on all ranks; `rows` are this rank's part of the prototypes, of which the
    `valid` ones take part. Differentiable once, in queries and rows; `scale` is a constant, since
    a flatter choice would be an escape. No matrix of samples and prototypes exists; 4 and 10 FLOPs
    a sample, row and number, forward and backward.
    """
    scale = scale.detach()
    log_local = log_partition(queries, scale, rows, valid=valid)
    shift = finite(comm.max(log_local.detach()))
    log_total = comm.sum((log_local - shift).exp()).log() + shift
    used: Tensor = _ColumnMeans.apply(queries, rows, log_total, scale)
    there = torch.ones_like(used) if valid is None else valid.to(used.dtype)
    used = used * there
    cubes, whole, num_rows = comm.sum(torch.stack([used.pow(3).sum(), used.sum(), there.sum()]))
    value: Tensor = num_rows.square() * cubes / whole
    return value


class _ColumnMeans(torch.autograd.Function):
    """mean_i exp(scale queries_i . rows_j - log_total_i), in blocks, made again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, rows: Tensor, log_total: Tensor, scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(queries, rows, log_total, scale)
        means = [
            _shares(queries, rows, log_total, scale, some).mean(dim=0)
            for some in _blocks(queries, rows)
        ]
        return torch.cat(means) if means else rows.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, rows, log_total, scale = ctx.saved_tensors
        of_queries, of_rows = torch.zeros_like(queries), torch.zeros_like(rows)
        of_total = torch.zeros_like(log_total)
        for some in _blocks(queries, rows):
            pulled = _shares(queries, rows, log_total, scale, some) * gradient[some] / len(queries)
            of_total -= pulled.sum(dim=1)
            of_queries.addmm_(pulled, rows[some])
            of_rows[some] = pulled.T @ queries
        return of_queries * scale, of_rows * scale, of_total, None


def _shares(queries: Tensor, rows: Tensor, log_total: Tensor, scale: Tensor, some: slice) -> Tensor:
    """At most one, also of rows that are not valid and not in the total."""
    return (scale * (queries @ rows[some].T) - log_total[:, None]).clamp_max(0).exp()


def _blocks(queries: Tensor, rows: Tensor) -> list[slice]:
    size = max(1, BLOCK_SCORES // max(1, len(queries)))
    return [slice(first, first + size) for first in range(0, len(rows), size)]


def warm_up(step: int, steps: int) -> float:
    """min(1, t / steps)^2 for a penalty's weight; 1 where `steps` is 0."""
    return min(1.0, step / steps) ** 2 if steps else 1.0
