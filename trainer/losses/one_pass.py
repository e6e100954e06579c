"""The multi-label losses with their gradients made in the forward pass: a third fewer products."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.kernels.one_pass import gradients_in_one_pass, leaves_one_pass, queries_per_block
from trainer.losses.learned_prototypes import (
    ActiveRows,
    Statistics,
    gathered_units,
    summed_over_ranks,
)
from trainer.losses.multilabel import (
    MultilabelLoss,
    MultilabelOptions,
    counted_samples,
    multilabel_loss,
)
from trainer.losses.units import lean_unit_rows


def one_pass_multilabel_loss(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: ActiveRows,
    comm: Comm,
    options: MultilabelOptions,
    *,
    present: Bool[Tensor, " batch"] | None = None,
) -> MultilabelLoss:
    """`multilabel_loss` of `prototype_statistics`; only its `loss` has gradients, and once.

    Arguments as there. Exchanges a sum for each block of samples, instead of one. For scales up to
    80, for steps that train (without gradients it does too much), and for a way that leaves plain
    torch to choose its own pieces.
    """
    logits = options.logits
    assert leaves_one_pass(logits.way, features.device), logits.way
    everyones = gathered_units(features, comm, gather_dtype=logits.gather_dtype)
    everyones_labels = comm.all_gather(labels)
    if present is None:
        everyones_present = torch.ones(
            len(everyones_labels), dtype=torch.bool, device=labels.device
        )
    else:
        everyones_present = comm.all_gather(present)
    positions = active.positions(everyones_labels)
    blocks: list[Statistics] = []
    counted = counted_samples(everyones_present, everyones_labels >= 0, options)
    num_counted = counted.sum().clamp_min(1)
    # Every block is an exchange, so all ranks make the same ones.
    most_rows = comm.max(torch.tensor(active.num_negatives, device=labels.device))
    block_queries = queries_per_block(int(most_rows), everyones.element_size())

    def upstream(some: slice, log_local: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = log_local.requires_grad_(), cosines.requires_grad_()
            statistics = summed_over_ranks(
                *(*leaves, positions[some], everyones_labels[some], everyones_present[some]),
                comm,
                scale=logits.scale,
            )
            rows = multilabel_loss(statistics, options).rows
            total = torch.where(counted[some], rows, 0.0).sum() / num_counted
            of_log, of_cosines = torch.autograd.grad(total, leaves, materialize_grads=True)
        blocks.append(Statistics(*(part.detach() for part in statistics)))
        return of_log, of_cosines

    def run(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_queries, of_rows = gradients_in_one_pass(
            *(queries, rows, positions, upstream),
            scale=logits.scale,
            num_negatives=active.num_negatives,
            bias=active.bias,
            ceiling=logits.ceiling,
            block_queries=block_queries,
        )
        return multilabel_loss(_joined(blocks), options).loss, of_queries, of_rows

    loss: Tensor = _OnePass.apply(everyones, lean_unit_rows(active.rows.to(everyones.dtype)), run)
    return multilabel_loss(_joined(blocks), options)._replace(loss=loss)


def _joined(blocks: list[Statistics]) -> Statistics:
    return Statistics(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


class _OnePass(torch.autograd.Function):
    """Holds gradients until they are asked for."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, rows: Tensor, run: Any) -> Tensor:
        loss, ctx.of_queries, ctx.of_rows = run(queries, rows)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or ctx.of_queries is None:
            raise RuntimeError("this loss has its gradients once, and no second derivative")
        of_queries, of_rows = ctx.of_queries, ctx.of_rows
        ctx.of_queries = ctx.of_rows = None
        return of_queries.mul_(gradients[0]), of_rows.mul_(gradients[0]), None
