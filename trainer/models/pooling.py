"""From the states of a text's tokens to one vector."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

Pooling = Literal["mean", "last", "cls"]


def pooled(
    states: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"], how: Pooling
) -> Float32[Tensor, "batch dim"]:
    """One vector a row, in float32; the mask is true on one position of a row at least.

    `mean` over the positions of the mask, the `last` of them, or `cls`: the first.
    """
    states = states.float()
    if how == "mean":
        return masked_mean(states, mask)
    rows = torch.arange(len(states), device=states.device)
    columns = torch.arange(mask.shape[1], device=mask.device)
    if how == "last":
        return states[rows, (mask * columns).amax(1)]
    return states[rows, mask.int().argmax(1)]


def real_tokens_first(
    tokens: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Rows filled up behind, whichever side they were filled on; the same where they are so."""
    order = (~mask).int().argsort(dim=1, stable=True)
    return tokens.gather(1, order), mask.gather(1, order)


def masked_mean(
    states: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch dim"]:
    """Mean over the positions where the mask is true; what is elsewhere is not looked at."""
    kept = states.masked_fill(~mask[..., None], 0)
    return kept.sum(1) / mask.sum(1, keepdim=True).to(states.dtype)
