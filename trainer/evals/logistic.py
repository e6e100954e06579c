"""Multinomial logistic regression on rows that are split over ranks, by L-BFGS.

Rank 0 drives: it says at which weights all ranks work out their share of the objective, and when
to stop. So no two ranks can disagree on how often to meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.stop import Check, go_on

MAX_ITERATIONS = 1000
TOLERANCE = 1e-6
"""Of an entry of the gradient."""
ROW_BLOCK = 8192
"""Rows whose logits, [rows, classes] in float64, are held at once."""


class Fit(NamedTuple):
    """The same on every rank."""

    weights: Float64[Tensor, "classes augmented"]
    """The bias is the last column."""
    steepest: float
    """Largest entry of the gradient there, as an absolute value."""
    converged: bool
    """Whether that is within the tolerance."""


def fit(
    features: Float64[Tensor, "n dim"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    penalty: float,
    comm: Comm,
    initial: Float64[Tensor, "classes augmented"] | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> Float64[Tensor, "classes augmented"]:
    """The weights of `fitted`; a warning where it has not converged."""
    found = fitted(
        features,
        labels,
        num_classes=num_classes,
        penalty=penalty,
        comm=comm,
        initial=initial,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )
    if not found.converged:
        warnings.warn(
            f"the fit has not converged after {max_iterations} iterations: an entry of the gradient"
            f" is {found.steepest:.1e}, above {tolerance:.1e}",
            stacklevel=2,
        )
    return found.weights


def fitted(
    features: Float64[Tensor, "n dim"],
    labels: Int64[Tensor, " n"],
    *,
    num_classes: int,
    penalty: float,
    comm: Comm,
    initial: Float64[Tensor, "classes augmented"] | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    check: Check = go_on,
) -> Fit:
    """Weights, with the bias as their last column, that minimise over the rows of all ranks

        mean cross-entropy + penalty / 2 * |weights without bias|^2

    which is scikit-learn's objective at C = 1 / (rows * penalty). Stops when no entry of the
    gradient is above `tolerance`, or after `max_iterations`, and says which. `check` is called
    before every look at the objective.
    """
    rows = with_ones(features)
    count = max(int(comm.sum(torch.tensor(rows.shape[0], device=rows.device))), 1)
    shape = (num_classes, rows.shape[1])
    start = rows.new_zeros(shape) if initial is None else initial

    def objective(weights: Tensor) -> tuple[Tensor, Tensor]:
        check()
        loss, gradient = _split(comm.sum(_loss_and_gradient(rows, labels, weights)) / count)
        shrunk = weights * penalty
        shrunk[:, -1] = 0.0
        return loss + 0.5 * (shrunk * weights).sum(), gradient.view(shape) + shrunk

    root = _curvature_root(comm.sum(rows.T @ rows) / count, num_classes, penalty)
    if comm.is_main:
        weights = _lead(objective, start, root, comm, max_iterations, tolerance)
    else:
        weights = _follow(objective, start, comm)
    steepest = float(objective(weights)[1].abs().max())
    return Fit(weights, steepest, steepest <= tolerance)


def with_ones(features: Float64[Tensor, "n dim"]) -> Float64[Tensor, "n dim+1"]:
    """The rows with a last column of ones, for the bias."""
    return F.pad(features, (0, 1), value=1.0)


Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights to the value and its gradient, of all ranks."""


class _Converged(Exception):
    """Ends the optimizer's step: it looks at gradients of its own variables only."""


def _curvature_root(products: Tensor, num_classes: int, penalty: float) -> Tensor:
    """The Cholesky factor of what bends the objective, [dim, dim], equal for all classes.

    At weights of zero the Hessian is about products / classes + penalty. Features have few strong
    directions and many weak ones, and with a weak penalty L-BFGS crawls along the weak ones; in
    variables weights @ root all bend alike, and it needs a tenth of the iterations.
    """
    curvature = products / num_classes
    curvature.diagonal()[:-1] += penalty
    curvature.diagonal().add_(1e-10 * curvature.diagonal().max())
    root: Tensor = torch.linalg.cholesky(curvature)
    return root


def _lead(
    objective: Objective,
    start: Tensor,
    root: Tensor,
    comm: Comm,
    max_iterations: int,
    tolerance: float,
) -> Tensor:
    """Rank 0: L-BFGS; every evaluation of the objective is announced to the other ranks."""
    variables = (start @ root).clone()
    optimizer = torch.optim.LBFGS(
        [variables],
        lr=1.0,
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def weights() -> Tensor:
        found: Tensor = torch.linalg.solve_triangular(root, variables, upper=False, left=False)
        return found

    def closure() -> Tensor:
        _, announced = _announce(weights(), comm, more=True)
        loss, gradient = objective(announced)
        if gradient.abs().max() <= tolerance:
            raise _Converged
        slope = torch.linalg.solve_triangular(root.T, gradient, upper=True, left=False)
        variables.grad = slope.contiguous()
        return loss

    with suppress(_Converged):
        optimizer.step(closure)
    return _announce(weights(), comm, more=False)[1]


def _follow(objective: Objective, start: Tensor, comm: Comm) -> Tensor:
    """The other ranks: evaluate where rank 0 says, until it says stop."""
    more, weights = _announce(start, comm, more=True)
    while more:
        objective(weights)
        more, weights = _announce(start, comm, more=True)
    return weights


def _announce(weights: Tensor, comm: Comm, *, more: bool) -> tuple[bool, Tensor]:
    """What rank 0 passes: whether to evaluate, and at which weights."""
    message = comm.broadcast(F.pad(weights.flatten(), (1, 0), value=float(more)))
    return bool(message[0].item()), message[1:].view(weights.shape)


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
