"""Mixtures of prototypes for each class, which follow the features (PALM, arXiv 2402.02653).

A class has several prototypes. Samples are assigned to those of their own class by Sinkhorn's
iterations, of which the largest few are kept; prototypes move towards what is assigned to them,
and features towards their class's prototypes, away from all others. Classes are divided over the
ranks: features travel, prototypes only for the contrast among them.

`paper` and `code` stand for the published formulas and the published program, which differ:

                paper                                  code
    assignment  in each class by itself                over all classes, then the own one is cut out
    movement    by the weighted sum of features        by their weighted mean
    likelihood  -log of a mixture's share              cross-entropy with soft labels
    contrast    sum in the log, against other classes  mean outside of it, against all others
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize, pad

from trainer.comm import Comm
from trainer.losses.units import at_least_float32

Parity = Literal["paper", "code"]


class ClassPrototypes(NamedTuple):
    """The prototypes of the classes that a rank owns: unit vectors."""

    rows: Float[Tensor, "classes prototypes dim"]
    first: int
    """The first class that is owned; the others follow it."""
    num_classes: int
    """Of all ranks together."""


@dataclass(frozen=True)
class PalmOptions:
    """How samples are assigned, how prototypes move, and how sharply both are compared."""

    parity: Parity = "paper"
    momentum: float = 0.999
    """Of a prototype in one movement."""
    kept: int = 0
    """Prototypes that a sample is assigned to; all of its class where zero."""
    temperature: float = 0.1
    """Cosines of features and prototypes are divided by it."""
    contrast_temperature: float = 0.5
    """Cosines of two prototypes are divided by it."""
    epsilon: float = 0.05
    """Cosines are divided by it in the assignment."""
    iterations: int = 3
    """Of Sinkhorn's alternation."""
    exchanged_views: int = 1
    """So many rows in a row are views of one image; with more than one, a view is compared with
    what the next one of them was assigned."""


class PalmResult(NamedTuple):
    """Both terms over the samples of all ranks, equal on all, and where the prototypes went."""

    likelihood: Float[Tensor, ""]
    contrast: Float[Tensor, ""]
    moved: Float[Tensor, "classes prototypes dim"]


def palm_terms(
    features: Float[Tensor, "rows dim"],
    labels: Int64[Tensor, " rows"],
    prototypes: ClassPrototypes,
    comm: Comm,
    options: PalmOptions,
) -> PalmResult:
    """Assign, move, assign again, and compare: one step of the method, in nats.

    Features are unit vectors, equally many on every rank; -1 is no label, and such a row counts
    nowhere. The likelihood sees prototypes as constants; the contrast reaches features through the
    movement alone, so its gradient is (1 - momentum) times as large as it looks.
    """
    everyones = comm.all_gather(at_least_float32(features))
    labels = comm.all_gather(labels)
    old = _padded(prototypes, comm)
    own = _ownership(labels, old, prototypes.first)
    seen = everyones.detach()
    assigned = assignment(seen, old, own, labels >= 0, comm, options, owned=len(prototypes.rows))
    kept = largest(assigned, options.kept)
    moved = moved_rows(everyones, old, own, assigned * kept, options)
    constant = moved.detach()
    again = assignment(seen, constant, own, labels >= 0, comm, options, owned=len(prototypes.rows))
    weights = exchanged(_shares(again * kept, dim=1), options.exchanged_views)
    valid = torch.arange(len(old), device=old.device) < len(prototypes.rows)
    terms = _log_likelihood(everyones, constant, own, weights, valid, comm, options)
    counted = labels >= 0
    likelihood = -terms.where(counted, 0.0).sum() / counted.sum().clamp_min(1)
    contrast = prototype_contrast(moved, prototypes.first, prototypes.num_classes, comm, options)
    return PalmResult(likelihood, contrast, constant[: len(prototypes.rows)])


@torch.no_grad()
def assignment(
    features: Float[Tensor, "rows dim"],
    prototypes: Float[Tensor, "classes prototypes dim"],
    own: Float[Tensor, "rows classes"],
    counted: Tensor,
    comm: Comm,
    options: PalmOptions,
    *,
    owned: int,
) -> Float[Tensor, "rows prototypes"]:
    """Shares of each sample in its class's prototypes; zero where another rank owns the class.

    Each round lets every prototype get the same in all, then every sample give one in all. The
    paper's rounds see one class, the program's all `owned` ones of all ranks.
    """
    shares = torch.exp((_cosines(features, prototypes) - 1) / options.epsilon)
    if options.parity == "paper":
        inside = _of_own(shares, own)
        for _ in range(options.iterations):
            inside = inside / (own @ (own.T @ inside)).clamp_min(_tiny(inside))
            inside = _shares(inside, dim=1)
        return inside
    shares[:, owned:] = 0
    shares = shares * counted[:, None, None]
    for _ in range(options.iterations):
        shares = _shares(shares, dim=0)
        whole = comm.sum(shares.sum(dim=(1, 2)))
        shares = shares / whole.clamp_min(_tiny(whole))[:, None, None]
    return _of_own(shares, own)


def largest(shares: Float[Tensor, "rows prototypes"], kept: int) -> Tensor:
    """One at the `kept` largest of each row and zero elsewhere; one everywhere where kept is 0."""
    if kept == 0 or kept >= shares.shape[1]:
        return torch.ones_like(shares)
    return torch.zeros_like(shares).scatter(1, shares.topk(kept, dim=1).indices, 1.0)


def exchanged(
    weights: Float[Tensor, "rows prototypes"], views: int
) -> Float[Tensor, "rows prototypes"]:
    """Each view's row is the next view's, the last one's the first's."""
    return weights.view(-1, views, weights.shape[1]).roll(-1, dims=1).flatten(0, 1)


def moved_rows(
    features: Float[Tensor, "rows dim"],
    prototypes: Float[Tensor, "classes prototypes dim"],
    own: Float[Tensor, "rows classes"],
    assigned: Float[Tensor, "rows prototypes"],
    options: PalmOptions,
) -> Float[Tensor, "classes prototypes dim"]:
    """normalize(m p + (1 - m) sum_i w_i z_i), with a gradient to features; p if nothing is its own.

    The paper's w are a sample's shares; the program divides them by a prototype's sum, so that
    they make a mean.
    """
    weights = own[:, :, None] * _shares(assigned, dim=1)[:, None, :]
    some = weights.sum(dim=0)[:, :, None] > 0
    if options.parity == "code":
        weights = _shares(weights, dim=0)
    drawn = (weights.flatten(1).T @ features).view_as(prototypes)
    moved = normalize(options.momentum * prototypes + (1 - options.momentum) * drawn, dim=2)
    return torch.where(some, moved, prototypes)


def prototype_contrast(
    prototypes: Float[Tensor, "classes prototypes dim"],
    first: int,
    num_classes: int,
    comm: Comm,
    options: PalmOptions,
) -> Float[Tensor, ""]:
    """Prototypes of one class find each other: the mean over all prototypes of all ranks.

    For a prototype, over P others of its class and N of other classes, s cosines over temperature:
    `-log(sum_P e^s / sum_N e^s)` in the paper, `-mean_P(s) + log(sum_(P and N) e^s)` in the code.
    Needs two prototypes a class, and the paper's form two classes.
    """
    per_class, dim = prototypes.shape[1:]
    everyones = comm.all_gather(prototypes)[:num_classes].reshape(-1, dim)
    rows = torch.arange(len(prototypes) * per_class, device=everyones.device) + first * per_class
    columns = torch.arange(len(everyones), device=everyones.device)
    itself = rows[:, None] == columns
    siblings = (rows[:, None] // per_class == columns // per_class) & ~itself
    logits = prototypes.reshape(-1, dim) @ everyones.T / options.contrast_temperature
    if options.parity == "paper":
        others = logits.masked_fill(siblings | itself, -torch.inf).logsumexp(dim=1)
        terms = logits.masked_fill(~siblings, -torch.inf).logsumexp(dim=1) - others
    else:
        mean = (logits * siblings).sum(dim=1) / (per_class - 1)
        terms = mean - logits.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    exists = rows < len(everyones)
    return -comm.sum(terms.where(exists, 0.0).sum()) / len(everyones)


def _log_likelihood(
    features: Tensor,
    prototypes: Tensor,
    own: Tensor,
    weights: Tensor,
    valid: Tensor,
    comm: Comm,
    options: PalmOptions,
) -> Float[Tensor, " rows"]:
    """Of each sample's class, with classes of all ranks in the denominator."""
    logits = _cosines(features, prototypes) / options.temperature
    logits = logits.masked_fill(~valid[None, :, None], -torch.inf)
    highest = comm.max(logits.detach().flatten(1).amax(dim=1))
    powers = torch.exp(logits - highest[:, None, None])
    if options.parity == "code":
        finite = logits.masked_fill(~valid[None, :, None], 0.0)
        said = comm.sum((weights * _of_own(finite, own)).sum(dim=1))
        return said - highest - comm.sum(powers.sum(dim=(1, 2))).log()
    inside = comm.sum((weights * _of_own(powers, own)).sum(dim=1))
    others = comm.sum((powers.mean(dim=2) * (1 - own)).sum(dim=1))
    tiny = _tiny(inside)
    return inside.clamp_min(tiny).log() - (inside + others).clamp_min(tiny).log()


def _padded(prototypes: ClassPrototypes, comm: Comm) -> Tensor:
    """As many classes on every rank: zeros behind the last."""
    rows = prototypes.rows
    size = -(-prototypes.num_classes // comm.world_size)
    return pad(rows, (0, 0, 0, 0, 0, size - len(rows)))


def _ownership(labels: Tensor, rows: Tensor, first: int) -> Float[Tensor, "rows classes"]:
    """One at a sample's class if this rank owns it."""
    classes = torch.arange(first, first + len(rows), device=labels.device)
    return (labels[:, None] == classes).to(rows.dtype)


def _cosines(features: Tensor, prototypes: Tensor) -> Float[Tensor, "rows classes prototypes"]:
    table = prototypes.to(features.dtype).flatten(0, 1)
    return (features @ table.T).view(len(features), *prototypes.shape[:2])


def _of_own(values: Tensor, own: Tensor) -> Float[Tensor, "rows prototypes"]:
    return (values * own[:, :, None]).sum(dim=1)


def _shares(values: Tensor, *, dim: int) -> Tensor:
    """Divided by their sum; zeros stay zeros."""
    return values / values.sum(dim=dim, keepdim=True).clamp_min(_tiny(values))


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny
