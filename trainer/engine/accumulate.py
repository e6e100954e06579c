"""Exact gradients of a loss over all rows of a rank, computed a micro-batch at a time.

A contrastive loss couples all rows, so gradients of micro-batches can't simply be added. Gao et
al. (GradCache, arXiv 2101.06983) cut the graph at the features: a first pass without gradient
gives all features, the loss on them gives d loss / d features, and a second pass per micro-batch
carries that into the parameters. Scalars (logit scales) are features too, shared by all passes.
The towers have no dropout, so both passes see the same features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trainer.stop import Check, go_on
from trainer.types import Batch, Features, Losses


@runtime_checkable
class Differentiable(Protocol):
    def __call__(self, batch: Batch) -> Features: ...
    def backward(self, loss: Tensor) -> None: ...


def accumulate(
    engine: Differentiable,
    loss_of: Callable[[Features, Batch], Losses],
    batches: Sequence[Batch],
    *,
    all_finite: Callable[[], bool] = lambda: True,
    check: Check = go_on,
    said: dict[str, Tensor] | None = None,
    term_norms: bool = False,
) -> Losses:
    """Add the gradient of `loss_of` on all micro-batches together; the result never depends on
    how the rows are cut into micro-batches (up to batch statistics of a norm, if there is one).

    `all_finite` is asked when the gradients outside of the engine are known. If it says no, the
    engine's become NaN where they are not zero anyway, so that it will discard the step. `check`
    is called before each of several passes; where it raises, the gradients are worth nothing.

    What `said` is given takes the scalars among the features, as the logit scale, and with
    `term_norms` the norm of each term's gradient at this rank's features. Terms then go backward
    one by one, which may round otherwise in the last bit.
    """
    at_once = len(batches) == 1
    check = go_on if at_once else check
    with torch.set_grad_enabled(at_once):
        passes = [_checked(engine, batch, check) for batch in batches]
    leaves = _joined(passes)
    losses = loss_of(leaves, _joined_batch(batches))
    if term_norms and said is not None:
        said.update(_backward_by_term(losses, leaves))
    else:
        losses.total.backward()
    if said is not None:
        said.update({n: v.detach() for n, v in leaves.tensors().items() if not v.dim()})
    factor = 1.0 if all_finite() else float("nan")
    for index, batch in enumerate(batches):
        again = passes[0] if at_once else _checked(engine, batch, check)
        engine.backward(_carried(again, leaves, index, len(batches)) * factor)
    return losses.detach()


def _backward_by_term(losses: Losses, leaves: Features) -> dict[str, Tensor]:
    """The gradient of the total, a term at a time; the norm of what each adds to the leaves."""
    norms: dict[str, Tensor] = {}
    rows = [leaf for leaf in leaves.tensors().values() if leaf.requires_grad]
    used = [(name, weight) for name, weight in losses.weights.items() if weight]
    for number, (name, weight) in enumerate(used):
        before = [None if leaf.grad is None else leaf.grad.clone() for leaf in rows]
        (losses[name] * weight).backward(retain_graph=number + 1 < len(used))
        added = [
            leaf.grad if old is None else leaf.grad - old
            for leaf, old in zip(rows, before, strict=True)
            if leaf.grad is not None
        ]
        norms[f"feature_gradient_norm/{name}"] = torch.stack(
            [torch.linalg.vector_norm(value.float()) for value in added]
        ).norm()
    return norms


def _checked(engine: Differentiable, batch: Batch, check: Check) -> Features:
    check()
    return engine(batch)


def _joined(passes: Sequence[Features]) -> Features:
    """Rows of all passes below each other, scalars once, as leaves that collect a gradient."""

    def leaf(values: Sequence[Tensor]) -> Tensor:
        value = torch.cat(tuple(values)) if values[0].dim() else values[0]
        return value.detach().requires_grad_(value.is_floating_point())

    said = [features.tensors() for features in passes]
    return Features.of({name: leaf([each[name] for each in said]) for name in said[0]})


def _carried(again: Features, leaves: Features, index: int, count: int) -> Tensor:
    """A scalar whose gradient is this micro-batch's share of the cached gradient."""
    terms, cached = [], leaves.tensors()
    for name, value in again.tensors().items():
        gradient = cached[name].grad
        if gradient is None:
            continue
        share = gradient.chunk(count)[index] if value.dim() else gradient / count
        terms.append((value * share).sum())
    return torch.stack(terms).sum()


def _joined_batch(batches: Sequence[Batch]) -> Batch:
    def joined(values: Sequence[Any]) -> Any:
        present = [value for value in values if value is not None]
        if present and isinstance(present[0], dict):
            return {name: torch.cat([each[name] for each in present]) for name in present[0]}
        return torch.cat(present) if present else None

    return Batch._make(joined(values) for values in zip(*batches, strict=True))
