"""The primitive's dense form, and ragged problems for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    queries: Tensor
    rows: Tensor
    positives: Tensor
    num_negatives: int
    bias: Tensor | None
    upstream: tuple[Tensor, Tensor]


def ragged_problem(
    queries: int, rows: int, dim: int, labels: int, *, seed: int = 0, extra: int = 0
) -> Problem:
    """Unit vectors, labels partly absent, partly twice; the last `extra` rows are no negatives;
    a row in ten does not exist, others are weighted."""
    draw = torch.Generator().manual_seed(seed)
    one, other = (
        torch.nn.functional.normalize(torch.randn(n, dim, generator=draw, dtype=torch.float64))
        for n in (queries, rows + extra)
    )
    positives = torch.randint(-1, max(1, rows + extra), (queries, labels), generator=draw)
    if labels > 1:
        positives[: queries // 2, 1] = positives[: queries // 2, 0]
    positives = positives if rows + extra else positives.fill_(-1)
    bias = torch.randn(rows, generator=draw, dtype=torch.float64)
    bias[torch.rand(rows, generator=draw) < 0.1] = -torch.inf
    upstream = (
        torch.rand(queries, generator=draw, dtype=torch.float64),
        torch.randn(queries, labels, generator=draw, dtype=torch.float64),
    )
    return Problem(one, other, positives, rows, bias, upstream)


def naive_logits(
    problem: Problem, *, scale: float, ceiling: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `prototype_logits`, from the whole matrix."""
    cosines = problem.queries @ problem.rows.T
    known = problem.positives >= 0
    if not len(problem.rows):
        nothing = cosines.sum() * 0
        return nothing.expand(len(cosines)).log(), nothing.expand(known.shape)
    places = problem.positives.clamp_min(0)
    excluded = torch.zeros(cosines.shape, dtype=torch.int64).scatter_add_(1, places, known.long())
    logits = scale * cosines
    if ceiling is not None:
        logits = torch.where(cosines > ceiling, 0.0, logits)
    logits = logits[:, : problem.num_negatives]
    if problem.bias is not None:
        logits = logits + problem.bias
    logits = logits.masked_fill(excluded[:, : problem.num_negatives] > 0, -torch.inf)
    # A sum of nothing would have no gradient but NaN.
    some = (logits > -torch.inf).any(dim=1)
    total = torch.where(some[:, None], logits, 0.0).logsumexp(dim=1)
    chosen = cosines.gather(1, places).masked_fill(~known, 0.0)
    return torch.where(some, total, -torch.inf), chosen


def pulled_back(
    outputs: tuple[Tensor, Tensor], problem: Problem, leaves: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of both outputs under the problem's upstream; sums of nothing have none."""
    log_total, cosines = outputs
    some = log_total > -torch.inf
    upstream = [value.to(cosines.dtype) for value in problem.upstream]
    value = (torch.where(some, log_total, 0.0) * upstream[0]).sum() + (cosines * upstream[1]).sum()
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(leaves, gradients, strict=True)
    )
