"""The linear probe of the public ProtoCLIP code, for numbers to set beside its published ones.

Not comparable with `linear_probe`: it wants features that are not normalised, goes through the
training rows in their given order (never shuffled), and reports the best test accuracy of all
epochs, so the test set chooses the epoch. A parity switch; no evaluation of a run calls it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.evals.scores import percent

LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-6
BATCH = 1024
EPOCHS = 100


def reference_probe(
    train: Float[Tensor, "n dim"],
    train_labels: Int64[Tensor, " n"],
    test: Float[Tensor, "m dim"],
    test_labels: Int64[Tensor, " m"],
    *,
    num_classes: int,
    epochs: int = EPOCHS,
) -> float:
    """Best test accuracy, in percent, over the epochs of SGD on a linear layer; one process.

    SGD with momentum, weight decay on weight and bias, a cosine over the epochs, batches of 1024
    in the rows' order. Starts from zero weights where the original draws them.
    """
    layer = torch.nn.Linear(train.shape[1], num_classes).to(train)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    best = 0.0
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = _learning_rate(epoch, epochs)
        _train_epoch(layer, optimizer, train, train_labels)
        best = max(best, _accuracy(layer, test, test_labels))
    return best


def _learning_rate(epoch: int, epochs: int) -> float:
    return LEARNING_RATE * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def _train_epoch(
    layer: torch.nn.Linear, optimizer: torch.optim.SGD, rows: Tensor, labels: Tensor
) -> None:
    for part, classes in zip(rows.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(layer(part), classes).backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(layer: torch.nn.Linear, rows: Tensor, labels: Tensor) -> float:
    right = sum(
        int((layer(part).argmax(dim=1) == classes).sum())
        for part, classes in zip(rows.split(BATCH), labels.split(BATCH), strict=True)
    )
    return percent(right, labels.shape[0])
