"""`augment` on a GPU: the host works out what the draws mean, and sends it as one small table."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from trainer.config import AugmentConfig
from trainer.data.views import Draws, blur_weights, jitter_factors, jitter_orders
from trainer.kernels.triton_colour import blur, change_colours


def augmented(
    images: UInt8[Tensor, "batch 3 size size"],
    draws: Float64[Tensor, "batch 11"],
    *,
    config: AugmentConfig,
) -> Float[Tensor, "batch 3 size size"]:
    """All of `augment` but its normalisation, in at most thirty launches whatever the batch."""
    drawn = Draws(draws, images.device)
    pixels = change_colours(images, drawn.sent(plans_of(drawn, config)))
    chosen = drawn.chosen("blur", config.blur_probability)
    if chosen.numel():
        weights = blur_weights(pixels.shape[-1], config.blur_sigma, drawn.of(chosen))
        blur(pixels, drawn.sent(chosen), drawn.sent(weights))
    if config.solarize_probability:
        is_chosen = drawn.happens("solarize", config.solarize_probability)
        bright = (pixels >= 0.5) & drawn.sent(is_chosen)[:, None, None, None]
        pixels = torch.where(bright, 1 - pixels, pixels)
    return pixels


def plans_of(drawn: Draws, config: AugmentConfig) -> Float32[Tensor, "batch 10"]:
    """For each image: four factors, which change comes in which turn or -1, flip, gray."""
    factors, orders = jitter_factors(drawn, config), jitter_orders(drawn)
    is_nothing = torch.tensor([strength == 0 for strength in config.jitter])[orders]
    is_jittered = drawn.happens("jitter", config.jitter_probability)[:, None]
    turns = torch.where(is_jittered & ~is_nothing, orders, -1)
    flip = drawn.happens("flip", config.flip)
    gray = drawn.happens("gray", config.gray_probability)
    return torch.cat(
        [torch.stack(factors, 1), turns.float(), flip[:, None], gray[:, None]], dim=1
    ).float()
