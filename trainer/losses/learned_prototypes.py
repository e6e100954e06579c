"""What the losses of a sharded table need of the logits, summed over the ranks.

Every rank computes the loss of the whole global batch from the same few numbers a sample, so that
one sum over [global_batch, labels + 2] is the only exchange besides features and their gradient.
Source of the sharding: Partial FC, arXiv 2203.15565.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from trainer.comm import Comm
from trainer.errors import DataError
from trainer.kernels.prototype_logits import pair_products, prototype_logits
from trainer.kernels.tiled import finite, fixed_reference
from trainer.kernels.way import BEST_WAY, Way
from trainer.losses.units import lean_unit_rows


class ActiveRows(NamedTuple):
    """The rows of this rank that take part in a step: a part of its shard, or all of it."""

    rows: Float[Tensor, "touched dim"]
    """Learnable, of any length: compared as directions. First the negatives, then rows that are
    only somebody's positives."""
    ids: Int64[Tensor, " touched"]
    """Their numbers in the whole table: ascending in the first part, and in the second."""
    num_negatives: int
    bias: Float[Tensor, " negatives"] | None = None
    """Added to the negatives' logits; -ln(rate) makes a sample's sum an estimate of the whole."""

    def positions(self, labels: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """Where these rows of the table stand among the active ones; -1 if they don't."""
        sampled, others = self.ids.split([self.num_negatives, len(self.ids) - self.num_negatives])
        place, elsewhere = _found(labels, sampled), _found(labels, others)
        beyond = torch.where(elsewhere >= 0, elsewhere + self.num_negatives, -1)
        return torch.where(place >= 0, place, beyond)


class LogitOptions(NamedTuple):
    """What makes logits of cosines, and how they are computed."""

    scale: float = 64.0
    """Of cosines."""
    ceiling: float | None = None
    """Negatives of a higher cosine count as a logit of zero, without gradient."""
    gather_dtype: torch.dtype | None = None
    """In which features travel; as they are where None. Their gradients travel in full."""
    way: Way = BEST_WAY


class Statistics(NamedTuple):
    """Of each sample of the global batch; equal on all ranks."""

    log_negatives: Float[Tensor, " batch"]
    """log sum_j exp(scale cos_ij) over the active rows that are no positives of i; or -inf."""
    cosines: Float[Tensor, "batch labels"]
    """With the positives; zero where there is none."""
    is_positive: Bool[Tensor, "batch labels"]
    present: Bool[Tensor, " batch"]
    """False for a row that only fills a short batch."""


def prototype_statistics(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: ActiveRows,
    comm: Comm,
    options: LogitOptions,
    *,
    present: Bool[Tensor, " batch"] | None = None,
) -> Statistics:
    """The statistics of the global batch, of which this rank brings some samples.

    `labels` are rows of the whole table, negative where there is none; one that no rank has active
    raises DataError on a CPU, and makes the loss NaN on a device, which looking would hold up.
    Batches are equally long on all ranks; `present` says which samples are real.

    Differentiable exactly: a loss of these may be of this rank's samples or of all, and its
    gradients are those of the sum of all ranks' losses. The objective is their mean, so the engine
    averages the encoder's and a head divides its own by the number of ranks.
    """
    everyones = gathered_units(features, comm, gather_dtype=options.gather_dtype)
    return statistics_of_gathered(
        *(everyones, comm.all_gather(labels), active, comm, options),
        present=None if present is None else comm.all_gather(present),
    )


def gathered_units(
    features: Float[Tensor, "batch dim"], comm: Comm, *, gather_dtype: torch.dtype | None = None
) -> Float[Tensor, "global_batch dim"]:
    """All ranks' features as directions, in float32 or better, having travelled in
    `gather_dtype`. The gradient is not rounded."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    result: Tensor = _Gathered.apply(
        lean_unit_rows(features.to(dtype)), comm, gather_dtype or dtype
    )
    return result


def statistics_of_gathered(
    queries: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: ActiveRows,
    comm: Comm,
    options: LogitOptions,
    *,
    present: Bool[Tensor, " batch"] | None = None,
) -> Statistics:
    """As `prototype_statistics`, of unit features and labels that every rank already has."""
    positions = active.positions(labels)
    log_local, cosines = prototype_logits(
        queries,
        lean_unit_rows(active.rows.to(queries.dtype)),
        positions,
        scale=options.scale,
        num_negatives=active.num_negatives,
        bias=active.bias,
        ceiling=options.ceiling,
        way=options.way,
    )
    if present is None:
        present = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return summed_over_ranks(
        *(log_local, cosines, positions, labels, present, comm), scale=options.scale
    )


def summed_over_ranks(
    log_local: Float[Tensor, " batch"],
    cosines: Float[Tensor, "batch labels"],
    positions: Int64[Tensor, "batch labels"],
    labels: Int64[Tensor, "batch labels"],
    present: Bool[Tensor, " batch"],
    comm: Comm,
    *,
    scale: float,
) -> Statistics:
    """What each rank found of the same samples in its own rows, put together by one sum."""
    shift = _shift(log_local, scale, comm)
    found = (positions >= 0).sum(dim=1, dtype=cosines.dtype)
    columns = [(log_local - shift).exp()[:, None], cosines, found[:, None]]
    total = comm.sum(torch.cat(columns, dim=1))
    is_positive = labels >= 0
    poison = _poison(total[:, -1], is_positive)
    log_negatives = _logarithm(total[:, 0]) + shift + poison
    return Statistics(log_negatives, total[:, 1:-1], is_positive, present)


@torch.no_grad()
def negative_figures(
    features: Float[Tensor, "batch dim"],
    labels: Int64[Tensor, "batch labels"],
    active: ActiveRows,
    comm: Comm,
) -> dict[str, Float[Tensor, ""]]:
    """`negative_cosine`: the mean over all samples and their negatives. `active_rows`: how many
    rows of the table are negatives, over all ranks. Equal on all ranks.

    A mean of products is a product of means, so this reads the rows once and multiplies nothing;
    still something for the steps that are logged. Counts samples that only fill a batch.
    """
    directions = lean_unit_rows(features.to(torch.promote_types(features.dtype, torch.float32)))
    everyones, positions = comm.all_gather(directions), active.positions(comm.all_gather(labels))
    rows = lean_unit_rows(active.rows[: active.num_negatives].to(everyones.dtype))
    excluded = torch.where(positions < active.num_negatives, positions, -1)
    excluded = excluded.masked_fill(_repeated(excluded), -1)
    products = torch.dot(everyones.sum(dim=0), rows.sum(dim=0))
    products -= pair_products(everyones, rows, excluded).sum()
    pairs = len(everyones) * len(rows) - (excluded >= 0).sum()
    counts = torch.stack([products, pairs.to(products.dtype), products.new_tensor(len(rows))])
    total = comm.sum(counts)
    return {"negative_cosine": total[0] / total[1].clamp_min(1), "active_rows": total[2]}


def _repeated(labels: Tensor) -> Tensor:
    """Where a sample has the same label further to the left."""
    same = labels[:, :, None] == labels[:, None, :]
    return same.tril(diagonal=-1).any(dim=2)


def _found(labels: Tensor, ids: Tensor) -> Tensor:
    if not len(ids):
        return torch.full_like(labels, -1)
    place = torch.searchsorted(ids, labels.contiguous()).clamp_max(len(ids) - 1)
    return torch.where(ids[place] == labels, place, -1)


def _shift(log_local: Tensor, scale: float, comm: Comm) -> Tensor:
    """What sums over ranks are relative to: a constant wherever float32 has room for it."""
    reference = fixed_reference(scale)
    if reference is None:
        return finite(comm.max(log_local))
    return torch.full_like(log_local, reference)


def _logarithm(mass: Tensor) -> Tensor:
    some = mass > 0
    return torch.where(some, torch.where(some, mass, 1.0).log(), -torch.inf)


def _poison(found: Tensor, is_positive: Tensor) -> Tensor:
    """Zero, or NaN for a sample with a label that no rank has."""
    wrong = found.detach() != is_positive.sum(dim=1)
    # Tensors that only have a shape, as in a plan of memory, can't be looked at.
    if wrong.device.type == "cpu" and not is_fake(wrong) and bool(wrong.any()):
        raise DataError(
            f"{int(wrong.sum())} of {len(wrong)} samples have a label that no rank has a row for; "
            "labels must be below the number of prototypes, and negative where there is none"
        )
    return torch.where(wrong, torch.nan, 0.0).to(found.dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, comm: Comm, dtype: torch.dtype) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(rows.to(dtype)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.comm.reduce_scatter(gradients[0]), None, None
