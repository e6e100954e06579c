"""Gates that learn to close: hard-concrete masks and a bound on how many stay open (TinyCLIP).

A gate multiplies a unit: a channel of the residual stream (`hidden`, shared by all layers), a head,
or a neuron of an MLP. It is drawn while it learns, and open or closed at the end. Louizos et al.,
arXiv 1712.01312; TinyCLIP, arXiv 2309.12314, section 3.2.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SHARPNESS = 2 / 3
"""beta: the temperature of a gate's draw."""
LOW, HIGH = -0.1, 1.1
"""A draw is stretched over this interval and cut to [0, 1], so that it is exactly 0 or 1 often."""
EDGE = 1e-6
"""Probabilities keep this distance from 0 and 1."""
LARGEST = math.log(100.0)
"""Of a gate's parameter, on either side; beyond it nothing would ever move back."""
SOFTENING = 0.8
"""Of the published code's gates in evaluation, which are neither a mean nor a mode."""
Sides = Literal["two", "one"]


class Gates(NamedTuple):
    """One tower's: of each unit the gate's parameter (log alpha), its probability or its value."""

    hidden: Float[Tensor, " width"]
    heads: Float[Tensor, "layers heads"]
    neurons: Float[Tensor, "layers neurons"]


class Multipliers(NamedTuple):
    """Lagrange multipliers of the distance to the wanted sparsity, which learn by ascent."""

    linear: Float[Tensor, ""]
    square: Float[Tensor, ""]


def drawn(
    log_alpha: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Gates in [0, 1] from uniform noise in (0, 1); differentiable where they are neither."""
    concrete = torch.sigmoid((noise.log() - (-noise).log1p() + log_alpha) / SHARPNESS)
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The probability that a draw is not zero."""
    shift = SHARPNESS * math.log(-LOW / HIGH)
    return torch.sigmoid(log_alpha - shift).clamp(EDGE, 1 - EDGE)


def softened(log_alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The published code's gate without noise; its order is the order of the parameters."""
    return torch.sigmoid(SOFTENING * log_alpha / SHARPNESS)


def is_open(
    log_alpha: Float[Tensor, "... units"], *, multiple: int = 1, least: int = 0
) -> Float[Tensor, "... units"]:
    """1 for the units that stay, else 0; per layer as many as are expected to be open, rounded up
    to a `multiple` where there are so many; `least` of them in any case.

    Of equal parameters the later ones close. Gates that only open or close make the masked and the
    pruned model one and the same; the published code keeps `softened` values of open gates.
    """
    units = log_alpha.shape[-1]
    rows = log_alpha.reshape(-1, units)
    closed = (units - open_probability(rows).sum(dim=1)).round().long()
    stay = (-(-(units - closed).clamp_min(least) // multiple) * multiple).clamp_max(units).tolist()
    result = torch.ones_like(rows)
    orders = rows.flip(1).argsort(dim=1, stable=True)
    for row, order, count in zip(result, orders, stay, strict=True):
        row[units - 1 - order[: units - count]] = 0.0
    return result.reshape(log_alpha.shape)


def kept_weights(open_share: Gates, *, head_dim: int) -> Float[Tensor, ""]:
    """Expected weights of attention and MLPs: of each pair of units the product of their chances.

    4 head_dim (sum of hidden) (sum of heads) + 2 (sum of hidden) (sum of neurons). Biases,
    norms and embeddings are not counted. Of gates that are 0 or 1: the weights that stay.
    """
    hidden, heads, neurons = (part.sum() for part in open_share)
    return hidden * (4 * head_dim * heads + 2 * neurons)


def published_kept_weights(open_share: Gates, *, head_dim: int) -> Float[Tensor, ""]:
    """The published code's count, in which an attention's biases belong to its heads."""
    width, count = open_share.hidden.shape[0], open_share.heads.shape[1]
    per_head = (4 * width**2 + 4 * width) // count
    hidden, heads, neurons = (part.sum() for part in open_share)
    return hidden * heads * per_head / width + 2 * hidden * neurons


def prunable_weights(there: Gates, *, head_dim: int) -> int:
    """`kept_weights` of gates that are 1 for every unit that there is, exactly: 12 layers width^2
    for usual sizes."""
    exact = Gates(*(part.double() for part in there))
    return round(float(kept_weights(exact, head_dim=head_dim)))


def published_prunable_weights(gates: Gates) -> int:
    """The published code's number: weights and biases, 12 width^2 + 9 width a layer."""
    layers, width = gates.heads.shape[0], gates.hidden.shape[0]
    return layers * (12 * width**2 + 9 * width)


def wanted_sparsity(step: int, *, start: float, target: float, steps: int) -> float:
    """Share of the weights that is to be gone: from `start` to `target` along a line."""
    return start + (target - start) * min(1.0, step / steps if steps else 1.0)


def lagrangian(
    sparsity: Float[Tensor, ""], wanted: float, multipliers: Multipliers, *, sides: Sides = "two"
) -> Float[Tensor, ""]:
    """linear * d + square * d^2 of the missing sparsity d = wanted - sparsity.

    `two`: too much sparsity is pulled back as too little is (the paper). `one`: d is 0 where there
    is enough (the published code), so that what was overshot stays.
    """
    missing = wanted - sparsity
    if sides == "one":
        missing = missing.clamp_min(0)
    return multipliers.linear * missing + multipliers.square * missing.square()
