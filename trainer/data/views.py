"""Random views of images whose every draw is a hash of (seed, purpose, epoch, sample id).

No generator is involved, so a view depends neither on the batch that a sample comes in, nor on
workers, ranks and restarts; on CPUs it is the same bit for bit. The operations are kornia's where
these keep that promise; its own random modules draw per batch and are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from kornia.color import rgb_to_grayscale
from kornia.filters import get_gaussian_kernel1d
from torch import Tensor
from torch.nn import functional

from trainer.config import AugmentConfig
from trainer.data.colour import CHANGES, Three, constants
from trainer.data.decode import Box
from trainer.hashing import hash_bits, key_of, uniform, uniform_of

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_REFERENCE_SIZE = 224
_REFERENCE_KERNEL = 21
"""The blur's kernel at the size for which its strength is stated; both scale with the image."""
_BLUR_STRENGTHS = 1024
_CROP_ATTEMPTS = 10
_ORDERS = torch.tensor(list(permutations(range(4))))

_key = lru_cache(maxsize=1024)(key_of)


class View(NamedTuple):
    """Which random view: the same four give every sample the same one again."""

    seed: int
    epoch: int
    purpose: str
    config: AugmentConfig


def random_crop(width: int, height: int, *, sample_id: int, view: View) -> Box:
    """A random resized crop: area uniform in `crop_scale`, ratio log-uniform in `crop_ratio`.

    Pairs that do not fit into the image are drawn again, ten times at most; then the largest
    centred box within the ratios is taken. This is the usual convention, without its rounding to
    whole pixels.
    """
    keys = _key(view.seed, view.purpose, "crop"), view.epoch
    low, high = (math.log(ratio) for ratio in view.config.crop_ratio)
    smallest, largest = view.config.crop_scale
    for attempt in range(_CROP_ATTEMPTS):
        area_draw, ratio_draw, across, down = (
            uniform_of(sample_id, *keys, 4 * attempt + which) for which in range(4)
        )
        area = (smallest + (largest - smallest) * area_draw) * width * height
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = across * (width - w), down * (height - h)
            return left, top, min(left + w, width), min(top + h, height)
    return _centred(width, height, view.config.crop_ratio)


DRAWS = (
    *("flip", "jitter", "gray", "blur", "solarize"),
    *("brightness", "contrast", "saturation", "hue", "order", "sigma"),
)
"""What is drawn for a view: whether it changes in each of the first ways, then how."""


def draw_view(
    sample_id: Int64[Tensor, " batch"],
    epochs: Int64[Tensor, " batch"],
    *,
    seed: int,
    purpose: str,
) -> Float64[Tensor, "batch 11"]:
    """All that a random view needs beside its crop: `DRAWS` in [0, 1), on the host."""
    ids = hash_bits(sample_id.cpu(), _key(seed, purpose, "augment"))
    bits = hash_bits(ids ^ hash_bits(epochs.cpu(), _key("epoch")))
    keys = torch.tensor([_key(name) for name in DRAWS])
    return uniform(bits[:, None].expand(-1, len(DRAWS)), keys)


def augment(
    images: UInt8[Tensor, "batch 3 size size"],
    draws: Float64[Tensor, "batch 11"],
    *,
    config: AugmentConfig,
    mean: Three = IMAGE_MEAN,
    deviation: Three = IMAGE_STD,
) -> Float[Tensor, "batch 3 size size"]:
    """Flip, colour jitter, gray, blur, solarize, each on the rows that draw it; then normalised.

    The four changes of a jitter come in a random order, as in torchvision's ColorJitter; hue is
    in turns of the colour circle. The draws are on the host, so nothing waits for a device.
    """
    if images.device.type == "cuda":
        from trainer.data.device_views import augmented  # Triton is where GPUs are

        return _standardized(augmented(images, draws, config=config), mean, deviation)
    stream = Draws(draws, images.device)
    pixels = _between_zero_and_one(images)
    turned = stream.rows("flip", config.flip)
    if turned.numel():
        pixels[turned] = pixels[turned].flip(-1)
    _on_rows(pixels, stream, "jitter", config.jitter_probability, config, _jitter)
    _on_rows(pixels, stream, "gray", config.gray_probability, config, _gray)
    _on_rows(pixels, stream, "blur", config.blur_probability, config, _blur)
    _on_rows(pixels, stream, "solarize", config.solarize_probability, config, _solarize)
    return _standardized(pixels, mean, deviation)


def flipped(draws: Float64[Tensor, "batch 11"], config: AugmentConfig) -> Int64[Tensor, " flipped"]:
    """The rows of a batch that `augment` flips."""
    return Draws(draws, draws.device).rows("flip", config.flip)


def normalize(
    images: UInt8[Tensor, "batch 3 size size"],
    *,
    mean: Three = IMAGE_MEAN,
    deviation: Three = IMAGE_STD,
) -> Float[Tensor, "batch 3 size size"]:
    """Divided by 255, less the mean, over the deviation: CLIP's where none are given."""
    return _standardized(_between_zero_and_one(images), mean, deviation)


class Draws:
    """The numbers of some rows: known on the host, and brought to the images' device."""

    def __init__(self, draws: Tensor, device: torch.device) -> None:
        self._draws, self._device = draws, device

    def uniform(self, name: str) -> Float64[Tensor, " batch"]:
        return self._draws[:, DRAWS.index(name)]

    def chosen(self, name: str, probability: float) -> Tensor:
        """Indices, on the host, of the rows to which something of this probability happens."""
        return self.happens(name, probability).nonzero().flatten()

    def happens(self, name: str, probability: float) -> Bool[Tensor, " batch"]:
        """To which rows, on the host."""
        return self.uniform(name) < probability

    def rows(self, name: str, probability: float) -> Tensor:
        """The same where the images are."""
        return self.sent(self.chosen(name, probability))

    def sent(self, values: Tensor) -> Tensor:
        return values.to(self._device, non_blocking=True)

    def of(self, rows: Tensor) -> Draws:
        return Draws(self._draws[rows], self._device)


def _on_rows(
    pixels: Tensor,
    stream: Draws,
    name: str,
    probability: float,
    config: AugmentConfig,
    change: Callable[[Tensor, Draws, AugmentConfig], Tensor],
) -> None:
    chosen = stream.chosen(name, probability)
    if chosen.numel():
        rows = stream.sent(chosen)
        pixels[rows] = change(pixels[rows], stream.of(chosen), config)


def _jitter(pixels: Tensor, stream: Draws, config: AugmentConfig) -> Tensor:
    factors, orders = jitter_factors(stream, config), jitter_orders(stream)
    for turn in range(4):
        for index, change in enumerate(CHANGES):
            chosen = (orders[:, turn] == index).nonzero().flatten()
            if chosen.numel() and config.jitter[index]:
                rows, factor = stream.sent(chosen), stream.sent(factors[index][chosen])
                pixels[rows] = change(pixels[rows], factor)
    return pixels


def jitter_factors(stream: Draws, config: AugmentConfig) -> list[Float[Tensor, " batch"]]:
    """Of brightness, contrast, saturation and hue."""
    ranges = [(max(0.0, 1.0 - x), 1.0 + x) for x in config.jitter[:3]]
    ranges.append((-config.jitter[3], config.jitter[3]))
    names = ("brightness", "contrast", "saturation", "hue")
    return [_between(r, stream.uniform(n)).float() for n, r in zip(names, ranges, strict=True)]


def jitter_orders(stream: Draws) -> Int64[Tensor, "batch 4"]:
    """Which of the four changes comes in which turn."""
    return _ORDERS[(stream.uniform("order") * len(_ORDERS)).long()]


def _gray(pixels: Tensor, stream: Draws, config: AugmentConfig) -> Tensor:
    return rgb_to_grayscale(pixels).expand_as(pixels)


def _blur(pixels: Tensor, stream: Draws, config: AugmentConfig) -> Tensor:
    weights = stream.sent(blur_weights(pixels.shape[-1], config.blur_sigma, stream))
    return _filtered(_filtered(pixels, weights).mT, weights).mT


def _solarize(pixels: Tensor, stream: Draws, config: AugmentConfig) -> Tensor:
    """Pillow's, at half of the largest value."""
    return torch.where(pixels >= 0.5, 1 - pixels, pixels)


def blur_weights(
    size: int, sigma: tuple[float, float], stream: Draws
) -> Float[Tensor, "batch taps"]:
    """Each image's own, on the host."""
    table = _blur_table(size, sigma)
    return table[(stream.uniform("sigma") * len(table)).long()]


@lru_cache(maxsize=16)
def _blur_table(size: int, sigma: tuple[float, float]) -> Float[Tensor, "strengths taps"]:
    """Gaussian kernels of many strengths; a table, so that a row's never depends on its batch."""
    radius = max(1, round(_REFERENCE_KERNEL * size / _REFERENCE_SIZE) // 2)
    strengths = (torch.arange(_BLUR_STRENGTHS) + 0.5) / _BLUR_STRENGTHS
    sigmas = _between(sigma, strengths) * (size / _REFERENCE_SIZE)
    return get_gaussian_kernel1d(2 * radius + 1, sigmas[:, None])


def _filtered(pixels: Tensor, weights: Float[Tensor, "batch taps"]) -> Tensor:
    """Each row of pixels times its image's weights: shifted copies added in a fixed order.

    A grouped convolution gives the same to rounding, but it rounds by how many images there are.
    """
    taps, width = weights.shape[1], pixels.shape[-1]
    padded = functional.pad(pixels, (taps // 2, taps // 2, 0, 0), mode="reflect")
    result = torch.zeros_like(pixels)
    for tap in range(taps):
        result.addcmul_(padded[..., tap : tap + width], weights[:, tap, None, None, None])
    return result


def _between(ends: tuple[float, float], draw: Tensor) -> Tensor:
    return ends[0] + (ends[1] - ends[0]) * draw


def _centred(width: int, height: int, ratios: tuple[float, float]) -> Box:
    ratio = min(max(width / height, ratios[0]), ratios[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _between_zero_and_one(images: Tensor) -> Tensor:
    return images.float().div_(255.0)


def _standardized(pixels: Tensor, mean: Three, deviation: Three) -> Tensor:
    means, deviations = (constants(row, pixels.device) for row in (mean, deviation))
    return pixels.sub_(means).div_(deviations)
