"""Random changes of colour and blur on a GPU: a whole batch in four launches.

In torch's operations each change of each turn picks its rows, changes them and puts them back:
hundreds of launches of a few microseconds. Here a program changes some pixels of one image in
registers, in the order that the image has drawn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

WIDTH = 10
"""Numbers of a plan: four factors, four turns (which change, or -1), flip, gray."""
PIXELS = 1024
"""Of a program."""
EXACT = 2**24
"""Grays are summed as whole numbers of this part, so in no particular order."""


@triton.jit
def gray_of(red, green, blue):  # type: ignore[no-untyped-def]
    return tl.fma(blue, 0.114, tl.fma(green, 0.587, red * 0.299))


@triton.jit
def clamped(values):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(values, 0.0), 1.0)


@triton.jit
def hue_channel(sextant, value, chroma):  # type: ignore[no-untyped-def]
    sextant -= tl.floor(tl.div_rn(sextant, 6.0)) * 6
    return value - clamped(tl.minimum(sextant, 4 - sextant)) * chroma


@triton.jit
def turned(red, green, blue, turns):  # type: ignore[no-untyped-def]
    """The hue by a share of the colour circle; value and chroma stay."""
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    other = tl.where(green == value, (blue - red) + 2 * chroma, (red - green) + 4 * chroma)
    hue = tl.div_rn(tl.where(red == value, green - blue, other), tl.maximum(chroma, 1e-12))
    hue += 6 * turns
    return (
        hue_channel(hue + 5.0, value, chroma),
        hue_channel(hue + 3.0, value, chroma),
        hue_channel(hue + 1.0, value, chroma),
    )


@triton.jit
def changed(red, green, blue, which, factor, mean):  # type: ignore[no-untyped-def]
    """Brightness, contrast, saturation or hue; nothing where `which` is below zero."""
    if which == 0:
        red, green, blue = clamped(red * factor), clamped(green * factor), clamped(blue * factor)
    if (which == 1) | (which == 2):
        other = gray_of(red, green, blue)
        if which == 1:
            other = other * 0.0 + mean
        other *= 1 - factor
        red, green = clamped(red * factor + other), clamped(green * factor + other)
        blue = clamped(blue * factor + other)
    if which == 3:
        red, green, blue = turned(red, green, blue, factor)
    return red, green, blue


@triton.jit
def loaded(images, image, at, inside, count):  # type: ignore[no-untyped-def]
    """Three channels between 0 and 1."""
    place = images + image * 3 * count + at
    red = tl.load(place, mask=inside, other=0).to(tl.float32)
    green = tl.load(place + count, mask=inside, other=0).to(tl.float32)
    blue = tl.load(place + 2 * count, mask=inside, other=0).to(tl.float32)
    return tl.div_rn(red, 255.0), tl.div_rn(green, 255.0), tl.div_rn(blue, 255.0)


@triton.jit
def contrast_sums(  # type: ignore[no-untyped-def]
    images, plans, sums, count, WIDTH: tl.constexpr, EXACT: tl.constexpr, PIXELS: tl.constexpr
):
    """Adds up the grays of an image as it is when its contrast changes."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    inside = at < count
    red, green, blue = loaded(images, image, at, inside, count)
    plan = plans + image * WIDTH
    reached = 0
    for turn in tl.static_range(4):
        which = tl.load(plan + 4 + turn).to(tl.int32)
        reached = tl.where(which == 1, 1, reached)
        which = tl.where(reached == 1, -1, which)
        factor = tl.load(plan + tl.maximum(which, 0))
        red, green, blue = changed(red, green, blue, which, factor, 0.0)
    grays = (gray_of(red, green, blue) * EXACT).to(tl.int64)
    total = tl.sum(tl.where(inside & (reached == 1), grays, 0), axis=0)
    tl.atomic_add(sums + image, total)


@triton.jit
def colours(  # type: ignore[no-untyped-def]
    images,
    plans,
    sums,
    output,
    side,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Flip, four changes in the image's order, gray."""
    image = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    count = side * side
    inside = at < count
    plan = plans + image * WIDTH
    across = at % side
    flip = tl.load(plan + 8) > 0
    source = at + tl.where(flip, side - 1 - 2 * across, 0)
    red, green, blue = loaded(images, image, source, inside, count)
    mean = (tl.load(sums + image).to(tl.float64) / (EXACT * count.to(tl.float64))).to(tl.float32)
    for turn in tl.static_range(4):
        which = tl.load(plan + 4 + turn).to(tl.int32)
        factor = tl.load(plan + tl.maximum(which, 0))
        red, green, blue = changed(red, green, blue, which, factor, mean)
    if tl.load(plan + 9) > 0:
        red = gray_of(red, green, blue)
        green = red
        blue = red
    place = output + image * 3 * count + at
    tl.store(place, red, mask=inside)
    tl.store(place + count, green, mask=inside)
    tl.store(place + 2 * count, blue, mask=inside)


@triton.jit
def blurred_along(  # type: ignore[no-untyped-def]
    source,
    output,
    rows,
    weights,
    taps,
    side,
    stride,
    FROM_BATCH: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Along the axis whose pixels lie `stride` apart: from the chosen rows of a batch to a buffer
    of them alone, or back. The edge is a mirror."""
    blurred = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    count = side * side
    inside = at < 3 * count
    row = tl.load(rows + blurred)
    base = source + (row if FROM_BATCH else blurred) * 3 * count
    target = output + (blurred if FROM_BATCH else row) * 3 * count
    along = at // stride % side
    total = tl.zeros((PIXELS,), tl.float32)
    for tap in range(taps):
        moved = tl.abs(along + tap - taps // 2)
        moved = tl.where(moved >= side, 2 * (side - 1) - moved, moved)
        values = tl.load(base + at + (moved - along) * stride, mask=inside, other=0.0)
        total = tl.fma(values, tl.load(weights + blurred * taps + tap), total)
    tl.store(target + at, total, mask=inside)


def change_colours(
    images: UInt8[Tensor, "batch 3 size size"], plans: Float32[Tensor, "batch 10"]
) -> Float32[Tensor, "batch 3 size size"]:
    """Flip, jitter and gray, as each image's plan says (`WIDTH`)."""
    batch, _, _, side = images.shape
    images, count = images.contiguous(), side * side
    output = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    sums = torch.zeros(batch, dtype=torch.int64, device=images.device)
    grid = (batch, triton.cdiv(count, PIXELS))
    sizes: dict[str, Any] = {"WIDTH": WIDTH, "EXACT": EXACT, "PIXELS": PIXELS}
    contrast_sums[grid](images, plans, sums, count, **sizes)
    colours[grid](images, plans, sums, output, side, **sizes)
    return output


def blur(
    pixels: Float32[Tensor, "batch 3 size size"],
    rows: Int64[Tensor, " blurred"],
    weights: Float32[Tensor, "blurred taps"],
) -> None:
    """In place, these images each with its own weights along both axes."""
    side, taps = pixels.shape[-1], weights.shape[1]
    between = torch.empty((len(rows), *pixels.shape[1:]), dtype=torch.float32, device=pixels.device)
    grid = (len(rows), triton.cdiv(3 * side * side, PIXELS))
    given: tuple[Any, ...] = (rows, weights, taps, side)
    blurred_along[grid](pixels, between, *given, 1, FROM_BATCH=True, PIXELS=PIXELS)
    blurred_along[grid](between, pixels, *given, side, FROM_BATCH=False, PIXELS=PIXELS)
