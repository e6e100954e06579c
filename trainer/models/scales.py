"""Learned temperatures and the logit bias, kept in range without touching the parameters."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LearnedScale(nn.Module):
    """exp(log initial + shift), folded into [1, largest]; `shift` is the parameter.

    The parameter is the distance from the start, because a module in bfloat16 then holds the
    start exactly and its surroundings finely (log 100 itself would be rounded by 0.3 %).

    The bound acts on the value: nothing is written to the parameter, which ZeRO-3 owns. A log
    that has run past a bound is reflected there. Its gradient changes sign with it, so the next
    steps bring it back: it neither dies, as behind a clamp, nor winds up, as behind a clamp with
    a straight-through gradient. And the gradient stays a linear function of the loss's, so that
    the sum over ranks and micro-batches does not depend on the split.
    """

    def __init__(self, initial: float, *, largest: float) -> None:
        super().__init__()
        self.initial, self.largest = initial, largest
        self.start = math.log(initial)
        self.top = math.log(largest)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self) -> Float[Tensor, ""]:
        """The scale in float32."""
        log = self.start + self.shift.float().squeeze(0)
        folded = torch.remainder(log, 2 * self.top)
        return torch.where(folded > self.top, 2 * self.top - folded, folded).exp()


class LearnedBias(nn.Module):
    """initial + shift; `shift` is the parameter (see LearnedScale)."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.start = initial
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self) -> Float[Tensor, ""]:
        return self.start + self.shift.float().squeeze(0)
