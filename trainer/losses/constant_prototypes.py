"""Prototypical cross-entropy against tables whose rows are split over the ranks.

Hard and soft targets have one form (an identity of the cross-entropy with constant targets):

    loss_i = logsumexp_j(s f_i . P_j) - s f_i . T[y_i]

with T = P for hard targets and T = softmax(Q Q^T / tau) P for soft ones. P and Q are constants
between two clusterings, so T is made once and no (batch x prototypes) matrix ever exists.
Source: ProtoCLIP, arXiv 2206.10996.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.kernels.log_partition import log_partition
from trainer.kernels.tiled import Partition, finite, merge, partition_sums
from trainer.losses.units import at_least_float32

_COLDEST, _HOTTEST = 1e-5, 1e3
_HALVINGS = 24


class PrototypeTable(NamedTuple):
    """This rank's prototypes: global rows `comm.row_range(num_prototypes)`. Constants."""

    prototypes: Float[Tensor, "local dim"]
    """P: what features are compared with."""
    targets: Float[Tensor, "local dim"]
    """T: the prototypes averaged under each row's target distribution."""
    valid: Bool[Tensor, " local"]
    """False where a prototype is empty: it takes no part in any softmax."""
    num_prototypes: int
    """Rows over all ranks."""


class TargetFigures(NamedTuple):
    """How soft the targets are, averaged over all labelled samples of all ranks."""

    own_mass: Float[Tensor, ""]
    """Probability that a target gives to the sample's own cluster."""
    entropy: Float[Tensor, ""]
    """In nats. The loss minus this is the mean Kullback-Leibler divergence from the target."""
    off_peak: Float[Tensor, ""]
    """Share of samples whose target is highest at a cluster that is not their own."""


def prototype_table(
    prototypes: Float[Tensor, "local dim"],
    teacher: Float[Tensor, "local teacher_dim"],
    *,
    valid: Bool[Tensor, " local"],
    num_prototypes: int,
    temperature: float,
    comm: Comm,
) -> PrototypeTable:
    """The table of one prototype term; `temperature` <= 0 means hard targets.

    Soft: T_k = sum_j softmax_j(Q_k . Q_j / temperature) P_j over the valid j, in float32 or
    better. The teacher's vectors may have a dimension of their own and are not normalised here.
    To keep empty prototypes as rows of logit zero, as the original did, pass `valid` all True.

    Cost: 2 * local * num_prototypes * (dim + teacher_dim) FLOPs, and one broadcast of all rows;
    another rank's rows are held one rank at a time, logits one tile at a time.
    """
    rows = at_least_float32(prototypes.detach())
    targets = rows
    if temperature > 0:
        softmax = _teacher_softmax(
            teacher, rows, valid, num_prototypes=num_prototypes, temperature=temperature, comm=comm
        )
        targets = softmax.mean.to(rows.dtype)
    return PrototypeTable(rows, targets, valid, num_prototypes)


def target_figures(
    teacher: Float[Tensor, "local teacher_dim"],
    *,
    counts: Int64[Tensor, " local"],
    valid: Bool[Tensor, " local"],
    num_prototypes: int,
    temperature: float,
    comm: Comm,
) -> TargetFigures:
    """Own mass, entropy and misplaced peaks of the targets; equal on all ranks.

    `counts` are the labelled samples of each cluster. Hard targets give 1, 0 and 0 at no cost;
    soft ones cost as much as the table itself.
    """
    rows = at_least_float32(teacher.detach())
    weight = (counts * valid).to(rows.dtype)
    if temperature <= 0:
        own_mass, entropy, off_peak = torch.ones_like(weight), weight * 0, weight * 0
    else:
        softmax = _teacher_softmax(
            rows, rows, valid, num_prototypes=num_prototypes, temperature=temperature, comm=comm
        )
        own = rows.square().sum(dim=1) / temperature
        own_mass = (own - softmax.log_partition).exp()
        entropy = softmax.log_partition - (rows * softmax.mean).sum(dim=1) / temperature
        # A thousandth of a nat is no other peak, but rounding or a twin of the own cluster.
        off_peak = (softmax.peak - own > 1e-3).to(rows.dtype)
    columns = torch.stack([own_mass, entropy, off_peak, torch.ones_like(weight)])
    sums = comm.sum(torch.where(weight > 0, columns * weight, 0.0).sum(dim=1))
    return TargetFigures(*(sums[:3] / sums[3].clamp_min(1.0)).unbind())


def temperature_of_entropy(
    teacher: Float[Tensor, "local teacher_dim"],
    *,
    counts: Int64[Tensor, " local"],
    valid: Bool[Tensor, " local"],
    num_prototypes: int,
    entropy: float,
    comm: Comm,
) -> float:
    """The temperature whose soft targets have this mean entropy in nats; equal on all ranks.

    A softmax's entropy only grows with its temperature, so halving an interval of the logarithm
    finds it, to a few millionths. The interval is `_COLDEST` to `_HOTTEST` times the longest
    centroid's squared length; where entropy leaves it (it is at most the logarithm of the valid
    rows, and twins share their mass at any temperature) the nearer end is the answer.

    Cost: `_HALVINGS` times that of `target_figures`.
    """
    rows = at_least_float32(teacher.detach())
    lengths = torch.where(valid, rows.square().sum(dim=1), 0.0)
    longest = float(comm.max(torch.cat([lengths, lengths.new_zeros(1)]).max()))
    low, high = math.log(_COLDEST * max(longest, 1e-30)), math.log(_HOTTEST * max(longest, 1e-30))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = target_figures(
            teacher,
            counts=counts,
            valid=valid,
            num_prototypes=num_prototypes,
            temperature=math.exp(middle),
            comm=comm,
        )
        low, high = (middle, high) if float(found.entropy) < entropy else (low, middle)
    return math.exp((low + high) / 2)


def prototype_cross_entropy(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, " batch"],
    table: PrototypeTable,
    scale: Float[Tensor, ""],
    comm: Comm,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of `softmax(scale * features @ P.T)` from the table's targets, in nats.

    This rank's sum over the known labels that a rank has on average, so that the mean over ranks
    is that over all known labels, for every split of a global batch. Where no label is known
    anywhere it is zero, and so are the gradients.
    """
    losses, known = prototype_losses(features, labels, table, scale, comm)
    num_known = comm.sum(known.sum()).clamp_min(1)
    known_per_rank = num_known.to(losses.dtype) / comm.world_size
    return losses.sum() / known_per_rank


def prototype_losses(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, " batch"],
    table: PrototypeTable,
    scale: Float[Tensor, ""],
    comm: Comm,
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Cross-entropy of each of this rank's samples, and whether its label is known.

    `labels` are global rows of the table. Negative ones are unknown, and so are labels of rows
    that are not valid: their loss is zero and carries no gradient. A label past the table makes
    the loss NaN, because looking for one would make the device wait. Features and scale get
    gradients, the table none. Batches are equally long on every rank.

    Cost per rank: 4 * global_batch * local * dim FLOPs; moves one all-gather of features, a
    maximum over [global_batch] and one reduce-scatter of [global_batch, 3].
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    everyones = comm.all_gather(features.to(dtype))
    rows, targets = table.prototypes.detach().to(dtype), table.targets.detach().to(dtype)

    log_mass = log_partition(everyones, scale.to(dtype), rows, valid=table.valid)
    peak = finite(comm.max(log_mass))
    chosen, is_mine = _own_targets(targets, comm.all_gather(labels), table, comm)
    aligned = scale * (everyones * chosen).sum(dim=1)
    shares = torch.stack([(log_mass - peak).exp(), aligned, is_mine.to(dtype)], dim=1)
    mass, aligned, owners = comm.reduce_scatter(shares).unbind(dim=1)

    batch = features.shape[0]
    own_peak = peak[comm.rank * batch : (comm.rank + 1) * batch]
    past_the_end = labels >= table.num_prototypes
    known = (owners.detach() > 0) | past_the_end
    losses = torch.where(known, mass, 1.0).log() + torch.where(known, own_peak - aligned, 0.0)
    return losses * torch.where(past_the_end, torch.nan, 1.0), known


def _own_targets(
    targets: Tensor, labels: Tensor, table: PrototypeTable, comm: Comm
) -> tuple[Tensor, Tensor]:
    """T[y] for the labels whose row is here and valid, zero rows for all others."""
    if not targets.shape[0]:
        return targets.new_zeros(labels.shape[0], targets.shape[1]), labels < labels
    first, last = comm.row_range(table.num_prototypes)
    local = (labels - first).clamp(0, last - first - 1)
    is_mine = (labels >= first) & (labels < last) & table.valid[local]
    return targets[local].where(is_mine[:, None], 0.0), is_mine


def _teacher_softmax(
    teacher: Tensor,
    values: Tensor,
    valid: Tensor,
    *,
    num_prototypes: int,
    temperature: float,
    comm: Comm,
) -> Partition:
    """softmax(Q Q^T / temperature) of this rank's rows over all ranks' rows, and its means."""
    queries = at_least_float32(teacher.detach())
    total = partition_sums(queries, queries[:0], values[:0], scale=1.0)
    for source in range(comm.world_size):
        first, last = replace(comm, rank=source).row_range(num_prototypes)
        keys, others, counted = (
            comm.broadcast(rows if source == comm.rank else _blank(rows, last - first), source)
            for rows in (queries, values, valid.to(torch.uint8))
        )
        part = partition_sums(
            queries, keys, others, scale=1.0 / temperature, valid=counted.to(torch.bool)
        )
        total = merge(total, part)
    return total


def _blank(rows: Tensor, count: int) -> Tensor:
    return rows.new_empty((count, *rows.shape[1:]))
