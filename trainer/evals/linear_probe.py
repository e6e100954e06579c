"""Linear probe: logistic regression on frozen image features.

Unit features, centred and scaled by one number, so that a penalty means the same for any model;
L-BFGS on the full data until the gradient vanishes; the penalty is chosen on a validation part of
the training shards (by hash of the sample id), then everything is fitted again. Accuracy is that
of the last weights: the test shards choose nothing. `reference_probe` has the public ProtoCLIP
code's protocol.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.evals.context import EvalContext
from trainer.evals.logistic import fitted, with_ones
from trainer.evals.scores import tally
from trainer.evals.search import nearest
from trainer.evals.splits import Splits, floors, load_splits
from trainer.evals.splits import wanted as wanted
from trainer.hashing import key_of, uniform
from trainer.recipe import Encode
from trainer.stop import Check, go_on

PENALTIES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Tried from strong to weak, each fit starting where the one before ended."""
VALIDATION_SHARE = 0.2


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Test accuracy of the probe, the `penalty` it chose, and the floors.

    Where one of its fits has not converged, `unconverged` is the largest entry of a gradient that
    should be zero: the accuracy is then that of an unfinished fit.
    """
    splits = load_splits(config, encode, context)
    splits = _standardized(splits, context.comm)
    penalty, weights, unfinished = choose_penalty(
        splits, seed=context.seed, comm=context.comm, check=context.check
    )
    last = fitted(
        splits.train.double(),
        splits.train_labels,
        num_classes=splits.num_learnt,
        penalty=penalty,
        comm=context.comm,
        initial=weights,
        check=context.check,
    )
    ranked = predict(last.weights, splits.test.double())
    figures = tally(ranked, splits.answers, num_classes=splits.num_classes, comm=context.comm)
    steepest = max(unfinished, 0.0 if last.converged else last.steepest)
    said = {"unconverged": steepest} if steepest else {}
    return {**figures, **floors(config, splits, context), "penalty": penalty, **said}


class Choice(NamedTuple):
    penalty: float
    weights: Float64[Tensor, "classes augmented"]
    unfinished: float
    """Largest entry of a gradient that did not vanish; 0 where all fits have converged."""


def choose_penalty(splits: Splits, *, seed: int, comm: Comm, check: Check = go_on) -> Choice:
    """The penalty of highest validation accuracy, and its weights; the stronger of equal ones."""
    held_out = uniform(splits.train_ids, key_of(seed, "probe validation")) < VALIDATION_SHARE
    features, labels = splits.train.double(), splits.train_labels
    best: tuple[float, float, Tensor] | None = None
    weights: Tensor | None = None
    unfinished = 0.0
    for penalty in PENALTIES:
        found = fitted(
            features[~held_out],
            labels[~held_out],
            num_classes=splits.num_learnt,
            penalty=penalty,
            comm=comm,
            initial=weights,
            check=check,
        )
        weights = found.weights
        unfinished = max(unfinished, 0.0 if found.converged else found.steepest)
        accuracy = tally(
            predict(weights, features[held_out]),
            labels[held_out, None],
            num_classes=splits.num_learnt,
            comm=comm,
        )["top1"]
        if best is None or accuracy > best[0]:
            best = accuracy, penalty, weights
    assert best is not None
    return Choice(best[1], best[2], unfinished)


def predict(
    weights: Float64[Tensor, "classes augmented"], features: Float64[Tensor, "n dim"]
) -> Int64[Tensor, "n k"]:
    """The five classes (or all, where there are fewer) of highest logit, best first."""
    k = min(5, weights.shape[0])
    return nearest(with_ones(features), weights, k=k, comm=Comm.solo(features.device)).rows


def _standardized(splits: Splits, comm: Comm) -> Splits:
    """Unit rows, less the mean of the training rows, over their root mean squared distance."""
    train, test = (F.normalize(rows.double(), dim=1) for rows in (splits.train, splits.test))
    count = comm.sum(torch.tensor(float(train.shape[0]), device=train.device))
    mean = comm.sum(train.sum(dim=0)) / count
    spread = (comm.sum((train - mean).square().sum()) / count).sqrt().clamp(min=1e-6)
    return splits._replace(train=(train - mean) / spread, test=(test - mean) / spread)
