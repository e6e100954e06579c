"""Losses of samples that belong to several prototypes at once, or to one.

All are formulas on the statistics of one pass: N_i, the log of the sum over negatives, and the
cosines c_ik with the positives, of which a margin makes s phi(c_ik).

    mlcd   log(1 + sum_k e^(-s phi_ik)) + log(1 + e^N_i)       (MLCD, arXiv 2407.17331)
    mlc    log(1 + sum_k e^(-s phi_ik) e^N_i)                  its baseline
    slots  mean_k [log(e^N_i + e^(s phi_ik)) - s phi_ik]       one cross-entropy for each label

`slots` with one label is the cross-entropy of Partial FC (`pfc_ce`, which takes one label only),
and so is `mlc`. `mlcd` with one label is RICE's object loss (arXiv 2507.20025): there is no other
name for it here.

All labels of a sample share one set of negatives, without any of its positives, so that `slots` is
eight cross-entropies at the price of one. The published form draws negatives for each slot anew,
and lets a sample's other positives in: `trainer.losses.prototype_loss.slots_loss`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.errors import ConfigError
from trainer.losses.learned_prototypes import LogitOptions, Statistics
from trainer.losses.margin import Margin

LossKind = Literal["mlcd", "mlc", "slots", "pfc_ce"]
DEFAULT_MARGIN = Margin("cosine", 0.3)


class MultilabelOptions(NamedTuple):
    """Which loss, and the logits that it is of."""

    kind: LossKind = "mlcd"
    margin: Margin = DEFAULT_MARGIN
    drop_unlabelled: bool = False
    """Leave samples without a label out of `mlcd`'s negative term too."""
    logits: LogitOptions = LogitOptions()


class MultilabelLoss(NamedTuple):
    """Of the global batch; equal on all ranks."""

    loss: Float[Tensor, ""]
    """Mean of `rows` over those counted; zero if there is none."""
    rows: Float[Tensor, " batch"]
    counted: Bool[Tensor, " batch"]
    figures: dict[str, Float[Tensor, ""]]
    """Means of the terms and of the positives' cosine, without gradients."""


def multilabel_loss(statistics: Statistics, options: MultilabelOptions) -> MultilabelLoss:
    """The mean loss of one kind over the samples of all ranks, in nats.

    A sample without a label still pays `mlcd`'s negative term, unless dropped; the other kinds
    have nothing to say about it and leave it out of the mean. A label given twice counts twice.
    """
    terms = row_terms(statistics, options)
    rows = torch.stack(list(terms.values())).sum(dim=0)
    counted = counted_samples(statistics.present, statistics.is_positive, options)
    figures = {name: mean_of(value, counted).detach() for name, value in terms.items()}
    is_positive = statistics.is_positive & counted[:, None]
    figures["positive_cosine"] = mean_of(statistics.cosines, is_positive).detach()
    return MultilabelLoss(mean_of(rows, counted), rows, counted, figures)


def row_terms(
    statistics: Statistics, options: MultilabelOptions
) -> dict[str, Float[Tensor, " batch"]]:
    """The terms whose sum is each sample's loss, by name."""
    logits = options.logits.scale * options.margin(statistics.cosines)
    formulas = {"mlcd": _mlcd, "mlc": _mlc, "slots": _slots, "pfc_ce": _pfc_ce}
    return formulas[options.kind](statistics, logits)


def counted_samples(
    present: Bool[Tensor, " batch"],
    is_positive: Bool[Tensor, "batch labels"],
    options: MultilabelOptions,
) -> Bool[Tensor, " batch"]:
    """The samples of the mean: real ones, and where the others cost nothing, labelled ones."""
    if options.kind == "mlcd" and not options.drop_unlabelled:
        return present
    return present & is_positive.any(dim=1)


def mean_of(values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """The mean over the counted values, zero where there is none."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)


def _mlcd(statistics: Statistics, logits: Tensor) -> dict[str, Tensor]:
    pulls = (-logits).masked_fill(~statistics.is_positive, -torch.inf)
    zero = logits.new_zeros(logits.shape[0], 1)
    return {
        "positive_term": torch.cat([zero, pulls], dim=1).logsumexp(dim=1),
        "negative_term": _log_one_plus(statistics.log_negatives),
    }


def _mlc(statistics: Statistics, logits: Tensor) -> dict[str, Tensor]:
    """Without a positive or without a negative the product is zero, and so is the loss."""
    labelled = statistics.is_positive.any(dim=1)
    # A row that is masked out everywhere would have no gradient but NaN.
    masked = ~statistics.is_positive & labelled[:, None]
    pulls = (-logits).masked_fill(masked, -torch.inf)
    if not logits.shape[1]:
        return {"loss_term": logits.new_zeros(logits.shape[0])}
    product = pulls.logsumexp(dim=1) + statistics.log_negatives
    return {"loss_term": torch.where(labelled, _log_one_plus(product), 0.0)}


def _slots(statistics: Statistics, logits: Tensor) -> dict[str, Tensor]:
    """log(e^N + e^z) - z = log(1 + e^(N - z)): small losses keep their digits."""
    each = _log_one_plus(statistics.log_negatives[:, None] - logits)
    known = statistics.is_positive
    total = torch.where(known, each, 0.0).sum(dim=1)
    return {"loss_term": total / known.sum(dim=1).clamp_min(1)}


def _pfc_ce(statistics: Statistics, logits: Tensor) -> dict[str, Tensor]:
    if logits.shape[1] != 1:
        raise ConfigError(
            f"pfc_ce takes one label a sample, not {logits.shape[1]}; keep the first, or use slots"
        )
    return _slots(statistics, logits)


def _log_one_plus(exponent: Tensor) -> Tensor:
    """log(1 + e^x), exact at both ends; zero at -inf."""
    return torch.logaddexp(exponent, torch.zeros_like(exponent))
