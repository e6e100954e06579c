"""Scores that should be higher for samples like the training set, and how well they tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import DataError

KEPT = 0.95
"""Share of the inside samples that the threshold of fpr95 keeps."""


class Separation(NamedTuple):
    """In percent. `inside` is the positive class."""

    auroc: float
    """Chance that an inside sample scores above an outside one; equal scores count half."""
    fpr95: float
    """Outside samples above the threshold that 95 % of the inside samples pass."""
    aupr_in: float
    """Average precision of finding the inside samples; equal scores are one step."""
    aupr_out: float
    """The same for finding the outside ones by low scores."""
    error: float
    """Lowest share of all samples that any threshold puts on the wrong side."""


def separation(inside: Float[Tensor, " n"], outside: Float[Tensor, " m"]) -> Separation:
    """How well the scores of two sets tell them apart. DataError for an empty set or a NaN."""
    for scores, name in ((inside, "inside"), (outside, "outside")):
        if not scores.numel() or bool(scores.isnan().any()):
            raise DataError(
                f"{int(scores.isnan().sum())} of {scores.numel()} {name} samples have no score; "
                "nothing can be told apart"
            )
    inside, outside = inside.double(), outside.double()
    threshold = torch.quantile(inside, 1 - KEPT)
    return Separation(
        auroc=100 * _auroc(inside, outside),
        fpr95=100 * float((outside > threshold).double().mean()),
        aupr_in=100 * _average_precision(inside, outside),
        aupr_out=100 * _average_precision(-outside, -inside),
        error=100 * _lowest_error(inside, outside),
    )


def _auroc(inside: Tensor, outside: Tensor) -> float:
    """In whole numbers: twice the outside samples below, and once those at the same score."""
    ordered = outside.sort()[0]
    below = torch.searchsorted(ordered, inside)
    not_above = torch.searchsorted(ordered, inside, right=True)
    return int((below + not_above).sum()) / (2 * len(inside) * len(outside))


def _above(scores: Tensor, thresholds: Tensor) -> Int64[Tensor, " thresholds"]:
    """How many scores are at least as high as each threshold."""
    return len(scores) - torch.searchsorted(scores.sort()[0], thresholds)


def _average_precision(positive: Tensor, negative: Tensor) -> float:
    """Sum over thresholds, from the highest, of precision times the recall that it adds."""
    thresholds = torch.cat([positive, negative]).unique().flip(0)
    found, false = _above(positive, thresholds), _above(negative, thresholds)
    added = found.diff(prepend=found.new_zeros(1)).double() / len(positive)
    return float((added * (found.double() / (found + false))).sum())


def _lowest_error(inside: Tensor, outside: Tensor) -> float:
    thresholds = torch.cat([inside, outside]).unique()
    missed = len(inside) - _above(inside, thresholds)
    wrong = missed + _above(outside, thresholds)
    rejected_all = len(inside)
    return min(int(wrong.min()), rejected_all) / (len(inside) + len(outside))


class Gaussian(NamedTuple):
    """Unit features as one normal distribution, or one for each class with a common shape."""

    means: Float64[Tensor, "means dim"]
    precision: Float64[Tensor, "dim dim"]

    def score(self, features: Float[Tensor, "n dim"]) -> Float64[Tensor, " n"]:
        """Minus the squared Mahalanobis distance from the nearest mean."""
        unit = F.normalize(features.double(), dim=1)
        return torch.stack([self._from(unit - mean) for mean in self.means]).max(dim=0)[0]

    def _from(self, offset: Tensor) -> Tensor:
        return -((offset @ self.precision) * offset).sum(dim=1)


def fit_gaussian(
    features: Float[Tensor, "n dim"],
    labels: Int64[Tensor, " n"] | None,
    *,
    num_classes: int,
    comm: Comm,
) -> Gaussian:
    """The normal distribution of all ranks' rows: of all together without labels (SSD, arXiv
    2103.12051), else with a mean for each class that occurs (arXiv 1807.03888).

    The pseudo-inverse of the population covariance: a direction without spread says nothing. On
    features that were standardized first, scores are the same.
    """
    unit = F.normalize(features.double(), dim=1)
    own = torch.zeros(len(unit), dtype=torch.int64) if labels is None else labels
    own = own.to(unit.device)
    count = 1 if labels is None else num_classes
    sizes = comm.sum(torch.bincount(own, minlength=count))
    sums = comm.sum(unit.new_zeros(count, unit.shape[1]).index_add(0, own, unit))
    means = sums / sizes.clamp(min=1)[:, None]
    offset = unit - means[own]
    covariance = comm.sum(offset.T @ offset) / sizes.sum()
    return Gaussian(means[sizes > 0], torch.linalg.pinv(covariance, hermitian=True))


def doubly_centred_score(
    train: Float[Tensor, "n dim"], features: Float[Tensor, "m dim"]
) -> Float64[Tensor, " m"]:
    """The score of the public PALM code, on one rank: unit features are standardized by those of
    the training set, then that set's mean is taken off a second time. Only for comparison with
    published figures: unlike `Gaussian` it changes when features are shifted."""
    train, features = (F.normalize(rows.double(), dim=1) for rows in (train, features))
    mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0)
    standard = (train - mean) / deviation
    precision = torch.linalg.pinv(torch.cov(standard.T, correction=0), hermitian=True)
    offset = (features - mean) / deviation - mean
    distance: Tensor = ((offset @ precision) * offset).sum(dim=1)
    return -distance
