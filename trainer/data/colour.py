"""The four changes of colour of a jitter: kornia's where these give a row the same in any batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from kornia.color import rgb_to_grayscale
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_saturation_with_gray_subtraction,
)
from torch import Tensor

Three = tuple[float, float, float]
"""A number for each channel of pixels between 0 and 1."""


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Away from the mean gray. It is summed in integers: exact, so in no particular order."""
    gray = (rgb_to_grayscale(pixels) * 2**24).long()
    mean = (gray.sum((1, 2, 3), keepdim=True).double() / (2**24 * gray[0].numel())).float()
    factor = factor[:, None, None, None]
    return (pixels * factor + mean * (1 - factor)).clamp(0.0, 1.0)


def hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue, keeping value and chroma: kornia's `adjust_hue` in a third of its passes.

    A channel is value - chroma * clamp(min(k, 4 - k), 0, 1), where k is the hue in sextants plus
    5, 3, 1 for red, green, blue, modulo 6.
    """
    red, green, blue = pixels.unbind(1)
    value = pixels.amax(1)
    chroma = value - pixels.amin(1)
    turn = torch.where(
        green == value, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    )
    turn = torch.where(red == value, green - blue, turn).div_(chroma.clamp(min=1e-12))
    turn.add_(6 * turns[:, None, None])
    sextant = turn[:, None] + constants((5.0, 3.0, 1.0), pixels.device)
    sextant.sub_((sextant / 6).floor_().mul_(6))
    share = torch.minimum(sextant, 4 - sextant).clamp_(0, 1)
    return value[:, None] - share.mul_(chroma[:, None])


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness_accumulative,
    contrast,
    adjust_saturation_with_gray_subtraction,
    hue,
)


@lru_cache(maxsize=64)
def constants(values: Three, device: torch.device) -> Float[Tensor, "3 1 1"]:
    """A number for each channel, sent to the device once."""
    return torch.tensor(values, device=device)[:, None, None]
