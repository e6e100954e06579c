"""Multinomial logistic regression on rows that are split over ranks, by L-BFGS.

Rank 0 drives: it says at which weights all ranks work out their share of the objective, and when
to stop. So no two ranks can disagree on how often to meet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor

from trainer.comm import Comm

ROW_BLOCK = 8192
"""Rows whose logits, [rows, classes] in float64, are held at once."""


def fit(
    features: Float64[Tensor, "n dim"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    penalty: float,
    comm: Comm,
    initial: Float64[Tensor, "classes augmented"] | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> Float64[Tensor, "classes augmented"]:
    """Weights, with the bias as their last column, that minimise over the rows of all ranks

        mean cross-entropy + penalty / 2 * |weights without bias|^2

    which is scikit-learn's objective at C = 1 / (rows * penalty). Stops when no entry of the
    gradient is above `tolerance`. The same on every rank.
    """
    rows = with_ones(features)
    count = max(int(comm.sum(torch.tensor(rows.shape[0], device=rows.device))), 1)
    shape = (num_classes, rows.shape[1])
    start = rows.new_zeros(shape) if initial is None else initial

    def share(flat: Tensor) -> Tensor:
        return _loss_and_gradient(rows, labels, flat.view(shape)) / count

    def objective(flat: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = _split(comm.sum(share(flat)))
        shrunk = flat.view(shape) * penalty
        shrunk[:, -1] = 0.0
        return loss + 0.5 * (shrunk * flat.view(shape)).sum(), gradient + shrunk.flatten()

    if not comm.is_main:
        return _follow(objective, start.flatten(), comm).view(shape)
    best = _lead(objective, start.flatten(), comm, max_iterations, tolerance)
    return best.view(shape)


def with_ones(features: Float64[Tensor, "n dim"]) -> Float64[Tensor, "n dim+1"]:
    """The rows with a last column of ones, for the bias."""
    return F.pad(features, (0, 1), value=1.0)


Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def _lead(
    objective: Objective, start: Tensor, comm: Comm, max_iterations: int, tolerance: float
) -> Tensor:
    """Rank 0: L-BFGS; every evaluation of the objective is announced to the other ranks."""
    weights = start.clone()
    optimizer = torch.optim.LBFGS(
        [weights],
        lr=1.0,
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        _announce(weights, comm, go_on=True)
        loss, weights.grad = objective(weights)
        return loss

    optimizer.step(closure)
    return _announce(weights, comm, go_on=False)[1]


def _follow(objective: Objective, start: Tensor, comm: Comm) -> Tensor:
    """The other ranks: evaluate where rank 0 says, until it says stop."""
    go_on, weights = _announce(start, comm, go_on=True)
    while go_on:
        objective(weights)
        go_on, weights = _announce(start, comm, go_on=True)
    return weights


def _announce(weights: Tensor, comm: Comm, *, go_on: bool) -> tuple[bool, Tensor]:
    """What rank 0 passes: whether to evaluate, and at which weights."""
    message = comm.broadcast(F.pad(weights, (1, 0), value=float(go_on)))
    return bool(message[0].item()), message[1:]


def _loss_and_gradient(rows: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Summed cross-entropy of these rows and, behind it, its gradient: [1 + classes * dim]."""
    loss = rows.new_zeros(())
    gradient = torch.zeros_like(weights)
    for part, classes in zip(rows.split(ROW_BLOCK), labels.split(ROW_BLOCK), strict=True):
        log_probabilities = (part @ weights.T).log_softmax(dim=1)
        loss += F.nll_loss(log_probabilities, classes, reduction="sum")
        excess = log_probabilities.exp() - F.one_hot(classes, weights.shape[0])
        gradient += excess.T @ part
    return torch.cat([loss.view(1), gradient.flatten()])


def _split(loss_and_gradient: Tensor) -> tuple[Tensor, Tensor]:
    return loss_and_gradient[0], loss_and_gradient[1:]
