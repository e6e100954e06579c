"""Tune a classifier on stored features: a linear one, a small network, or that with NMTune's terms.

The loss is cross-entropy on both views + weights * terms (`terms`), on features that are
standardized by the training set. Batches are drawn by hash and split over ranks row by row, batch
norm and terms see the global batch: the number of ranks changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from pydantic import Field
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError
from trainer.hashing import hash_bits, key_of, permutation, uniform
from trainer.tuning.features import LabelledStore, Standard
from trainer.tuning.head import Adapter, classifier
from trainer.tuning.terms import consistency, covariance, dominance

SMALLEST_BATCH = 8
"""Rows of a global batch under which its covariance and spectrum say nothing."""


class TuneConfig(Frozen):
    """One classifier. Its weights are those after the last step; no test set chooses anything."""

    method: Literal["linear", "mlp"] = "mlp"
    """`linear` reads clean features; `mlp` is a residual network under the classifier, on views."""
    epochs: PositiveInt = 30
    batch: PositiveInt = 64
    """Samples a step over all ranks; `mlp` reads two views of each."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of AdamW; to zero by half a cosine, without warm-up."""
    weight_decay: float = Field(default=1e-4, ge=0)
    consistency: float = Field(default=0.0, ge=0)
    """Weight of the distance between tuned features of a view and frozen ones of the other."""
    consistency_mean: Literal["rows", "elements"] = "rows"
    """Over what the squared distance is averaged; `elements` makes it smaller by the width."""
    covariance: float = Field(default=0.0, ge=0)
    """Weight of the squared correlations between features."""
    dominance: float = Field(default=0.0, ge=0)
    """Weight of the share of the largest singular values, which is to grow."""
    dominance_top: PositiveInt = 1
    """How many of them."""
    residual_scale: float = 1.0
    """Of the network's output beside the frozen features, at the start."""

    @property
    def is_regularised(self) -> bool:
        return bool(self.consistency or self.covariance or self.dominance)


PRESETS = {
    "linear": TuneConfig(method="linear", learning_rate=1e-2),
    "mlp": TuneConfig(),
    "paper": TuneConfig(consistency=0.01, covariance=0.01, dominance=0.01),
    "repo": TuneConfig(
        consistency=1.0,
        consistency_mean="elements",
        covariance=0.04,
        dominance=0.001,
        dominance_top=5,
    ),
}
"""`paper` and `repo` are NMTune as arXiv 2309.17002 states it and as its code computes it."""


class Tuned(nn.Module):
    """The trained classifier; `features` are what its last layer reads."""

    def __init__(self, config: TuneConfig, standard: Standard, num_classes: int) -> None:
        super().__init__()
        dim = len(standard.mean)
        self.standard = standard
        linear = config.method == "linear"
        self.adapter = None if linear else Adapter(dim, scale=config.residual_scale)
        self.head = classifier(dim, num_classes)

    def features(self, frozen: Float[Tensor, "n dim"], comm: Comm) -> Float[Tensor, "n dim"]:
        """From features that are standardized already."""
        return frozen if self.adapter is None else self.adapter(frozen, comm)


def tune(data: LabelledStore, config: TuneConfig, *, seed: int, comm: Comm) -> Tuned:
    """Train on the whole store; the same weights on every rank.

    ConfigError where the method compares views and the store has none.
    """
    if config.method == "mlp" and data.num_views < 2:
        raise ConfigError(
            f"{data.store.folder} has {data.store.num_vectors} vectors a sample; an mlp compares "
            "two augmented views: embed with --views 4, say, or take the method linear"
        )
    model = _built(config, Standard.of(data, comm), len(data.names), seed).to(comm.device)
    steps = config.epochs * math.ceil(len(data.ids) / config.batch)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    model.train()
    for views in _views(data, config, seed=seed, comm=comm):
        optimizer.zero_grad()
        step_loss(model, views, config, comm).backward()
        _mean_over_ranks(model, comm)
        optimizer.step()
        schedule.step()
    return model.eval()


class Views(NamedTuple):
    """This rank's rows of a batch: one view of each sample, or two."""

    first: Float32[Tensor, "n dim"]
    second: Float32[Tensor, "n dim"] | None
    labels: Int64[Tensor, " n"]


def step_loss(model: Tuned, views: Views, config: TuneConfig, comm: Comm) -> Float[Tensor, ""]:
    """The loss of the global batch; the same on every rank."""
    first = model.standard(views.first)
    if views.second is None:
        return _cross_entropy(model.head(model.features(first, comm)), views.labels, comm)
    frozen = torch.cat([first, model.standard(views.second)])
    tuned = model.features(frozen, comm)
    loss = _cross_entropy(model.head(tuned), views.labels.repeat(2), comm)
    if not config.is_regularised:
        return loss
    return loss + regularisers(tuned, first, config, comm)


def regularisers(
    tuned: Float[Tensor, "two_n dim"], first: Float[Tensor, "n dim"], config: TuneConfig, comm: Comm
) -> Float[Tensor, ""]:
    """The weighted terms of a batch of both views, the rows of the first view on top."""
    second = tuned[first.shape[0] :]
    loss = config.consistency * consistency(second, first, mean=config.consistency_mean, comm=comm)
    if int(comm.sum(torch.tensor(tuned.shape[0], device=tuned.device))) < SMALLEST_BATCH:
        return loss
    if config.covariance:
        loss = loss + config.covariance * covariance(tuned, comm=comm)
    if config.dominance:
        loss = loss + config.dominance * dominance(tuned, top=config.dominance_top, comm=comm)
    return loss


def _cross_entropy(logits: Tensor, labels: Tensor, comm: Comm) -> Tensor:
    count = comm.sum(logits.new_tensor(float(labels.shape[0])))
    return comm.sum(F.cross_entropy(logits, labels, reduction="sum")) / count


def _mean_over_ranks(model: nn.Module, comm: Comm) -> None:
    """The objective is the mean over ranks, so its gradient is the mean of theirs."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    together = torch.cat([g.flatten() for g in gradients])
    mean = comm.sum(together) / comm.world_size
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _built(config: TuneConfig, standard: Standard, num_classes: int, seed: int) -> Tuned:
    """The same start on every rank, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, "tuning") & ((1 << 63) - 1))
        return Tuned(config, standard, num_classes)


def _views(data: LabelledStore, config: TuneConfig, *, seed: int, comm: Comm) -> Iterator[Views]:
    """Every step's rows: an epoch is cut into batches whose sizes differ by one at most."""
    count = len(data.ids)
    for epoch in range(config.epochs):
        order = permutation(count, key_of(seed, "tuning order", epoch))
        for batch in order.tensor_split(math.ceil(count / config.batch)):
            first, last = comm.row_range(len(batch))
            yield _read(data, batch[first:last], config, key_of(seed, "tuning views", epoch), comm)


def _read(data: LabelledStore, rows: Tensor, config: TuneConfig, key: int, comm: Comm) -> Views:
    labels = data.labels[rows].to(comm.device)
    if config.method == "linear":
        return Views(data.clean(rows).to(comm.device), None, labels)
    ids, num = data.ids[rows], data.num_views
    first = (uniform(ids, key) * num).long()
    # Any of the others: two different views of a sample.
    second = (first + 1 + (uniform(hash_bits(ids, key), key) * (num - 1)).long()) % num
    one, other = (data.view(rows, which + 1).to(comm.device) for which in (first, second))
    return Views(one, other, labels)
