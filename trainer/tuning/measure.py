"""What a tuned classifier reaches on a test set, and how its features spread there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.evals.linear_probe import choose_penalty
from trainer.evals.logistic import fitted, with_ones
from trainer.evals.splits import Splits
from trainer.tuning.features import LabelledStore, Standard, own_blocks
from trainer.tuning.fit import Tuned
from trainer.tuning.spectra import Moments, spectrum

Classify = Callable[[Tensor], Tensor]
"""Features as they are stored to logits."""


@torch.no_grad()
def accuracy(classify: Classify, data: LabelledStore, comm: Comm) -> float:
    """Percent of all samples; one of a class that was not learnt counts as wrong."""
    right = torch.zeros((), dtype=torch.int64, device=comm.device)
    for rows in own_blocks(len(data.ids), comm):
        guesses = classify(data.clean(rows)).argmax(dim=1)
        right += (guesses == data.labels[rows].to(comm.device)).sum()
    return 100.0 * int(comm.sum(right)) / len(data.ids)


@torch.no_grad()
def spread(
    features: Callable[[Tensor], Tensor], data: LabelledStore, comm: Comm
) -> dict[str, float]:
    """SVE and LSVR of the features of a test set, with and without the mean row."""
    moments = Moments.none(data.store.dim, comm.device)
    for rows in own_blocks(len(data.ids), comm):
        moments = moments.plus(features(data.clean(rows)))
    moments = moments.over(comm)
    plain, centred = spectrum(moments), spectrum(moments, column_centred=True)
    return {
        "sve": plain.sve,
        "lsvr": plain.lsvr,
        "sve_centred": centred.sve,
        "lsvr_centred": centred.lsvr,
    }


def tuned_features(model: Tuned, comm: Comm) -> Callable[[Tensor], Tensor]:
    """Stored features to those that the classifier's last layer reads."""
    return lambda rows: model.features(model.standard(rows.to(comm.device)), comm)


def tuned_classify(model: Tuned, comm: Comm) -> Classify:
    features = tuned_features(model, comm)
    return lambda rows: model.head(features(rows))


def logistic(data: LabelledStore, *, seed: int, comm: Comm) -> tuple[Classify, float]:
    """Logistic regression by L-BFGS on standardized clean features, and the penalty it took.

    The penalty is chosen on a part of the training set; then everything is fitted again.
    """
    standard = Standard.of(data, comm)
    own = torch.cat([*own_blocks(len(data.ids), comm), torch.empty(0, dtype=torch.int64)])
    train = standard(data.clean(own)).double()
    labels, ids = data.labels[own].to(comm.device), data.ids[own].to(comm.device)
    nothing = train[:0]
    splits = Splits(
        *(train, labels, ids, nothing, labels[:0, None]), len(data.names), len(data.names)
    )
    choice = choose_penalty(splits, seed=seed, comm=comm)
    fit = fitted(
        *(train, labels),
        num_classes=len(data.names),
        penalty=choice.penalty,
        comm=comm,
        initial=choice.weights,
    )
    return lambda rows: with_ones(standard(rows).double()) @ fit.weights.T, choice.penalty
