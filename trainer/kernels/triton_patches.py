"""The loudest patch of each word on a GPU: scores, activation and maximum in one Triton kernel.

Forward, a program holds a tile of words against all patches of one image: products stay in
registers, and what leaves the chip is a number and a patch for each word, 2 I P V D operations.
Backward, the winners say where the gradient goes: tiles of the sparse matrix [patches, words] are
made of them again, and multiplied. Every sum has one order, so two runs have equal bits.
Fusing head, activation and maximum: Sparton, arXiv 2603.25011.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.triton_logits import HALF_RANGE, allow_descriptors, operands


class Tiles(NamedTuple):
    """Sizes of a program."""

    patches: int = 64
    words: int = 128
    dim: int = 64
    warps: int = 8
    stages: int = 3


@triton.jit
def loudest_patches(  # type: ignore[no-untyped-def]
    patches,
    words,
    values,
    winners,
    num_images,
    num_patches,
    num_words,
    dim,
    PATCHES: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    ACTIVATED: tl.constexpr,
):
    """One tile of words and one image; neighbours read the same words. Of equal patches the
    first; a score that is no number makes the value none."""
    image = tl.program_id(0) % num_images
    word_tile = tl.program_id(0) // num_images
    left = tl.make_tensor_descriptor(
        patches, [num_images * num_patches, dim], [dim, 1], [PATCHES, DIM]
    )
    right = tl.make_tensor_descriptor(words, [num_words, dim], [dim, 1], [WORDS, DIM])
    best = tl.full([WORDS], -float("inf"), dtype=tl.float32)
    place = tl.zeros([WORDS], dtype=tl.int32)
    broken = tl.zeros([WORDS], dtype=tl.int32)
    for first in range(0, num_patches, PATCHES):
        scores = tl.zeros([PATCHES, WORDS], dtype=tl.float32)
        for start in range(0, dim, DIM):
            some_patches = left.load([image * num_patches + first, start])
            some_words = right.load([word_tile * WORDS, start])
            scores = tl.dot(some_patches, some_words.T, scores, input_precision="tf32")
        patch = first + tl.arange(0, PATCHES)
        # What follows the image's last patch is the next image's.
        scores = tl.where((patch < num_patches)[:, None], scores, -float("inf"))
        broken = tl.maximum(broken, tl.max((scores != scores).to(tl.int32), axis=0))
        top = tl.max(scores, axis=0)
        at = tl.min(tl.where(scores == top[None, :], patch[:, None], num_patches), axis=0)
        place = tl.where(top > best, at, place)
        best = tl.maximum(best, top)
    if ACTIVATED:
        best = tl.where(best >= 0, best + 1, tl.exp(tl.minimum(best, 0.0)))
    best = tl.where(broken > 0, float("nan"), best)
    word = word_tile * WORDS + tl.arange(0, WORDS)
    to = image.to(tl.int64) * num_words + word
    tl.store(values + to, best, mask=word < num_words)
    tl.store(winners + to, place.to(tl.int16), mask=word < num_words)


@triton.jit
def gradient_of_patches(  # type: ignore[no-untyped-def]
    winners,
    shares,
    words,
    gradient,
    num_images,
    num_patches,
    num_words,
    dim,
    PATCHES: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
):
    """One tile of an image's patches and of their numbers: the words that each has won."""
    patch_tiles = tl.cdiv(num_patches, PATCHES)
    tile = tl.program_id(0) % (num_images * patch_tiles)
    start = tl.program_id(0) // (num_images * patch_tiles) * DIM
    image = tile // patch_tiles
    patch = tile % patch_tiles * PATCHES + tl.arange(0, PATCHES)
    right = tl.make_tensor_descriptor(words, [num_words, dim], [dim, 1], [WORDS, DIM])
    total = tl.zeros([PATCHES, DIM], dtype=tl.float32)
    own = image.to(tl.int64) * num_words
    for first in range(0, num_words, WORDS):
        word = first + tl.arange(0, WORDS)
        winner = tl.load(winners + own + word, mask=word < num_words, other=-1).to(tl.int32)
        share = tl.load(shares + own + word, mask=word < num_words, other=0.0)
        won = tl.where(winner[None, :] == patch[:, None], share[None, :], 0.0)
        some_words = right.load([first, start])
        total = tl.dot(won.to(some_words.dtype), some_words, total, input_precision="tf32")
    number = start + tl.arange(0, DIM)
    to = gradient + (image.to(tl.int64) * num_patches + patch[:, None]) * dim + number[None, :]
    tl.store(to, total, mask=(patch < num_patches)[:, None] & (number < dim)[None, :])


@triton.jit
def gradient_of_words(  # type: ignore[no-untyped-def]
    winners,
    shares,
    patches,
    gradient,
    num_images,
    num_patches,
    num_words,
    dim,
    PATCHES: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
):
    """One tile of words and of their numbers: the patches that each was won by."""
    word_tiles = tl.cdiv(num_words, WORDS)
    word = tl.program_id(0) % word_tiles * WORDS + tl.arange(0, WORDS)
    start = tl.program_id(0) // word_tiles * DIM
    right = tl.make_tensor_descriptor(
        patches, [num_images * num_patches, dim], [dim, 1], [PATCHES, DIM]
    )
    total = tl.zeros([WORDS, DIM], dtype=tl.float32)
    for image in range(num_images):
        winner = tl.load(winners + word, mask=word < num_words, other=-1).to(tl.int32)
        share = tl.load(shares + word, mask=word < num_words, other=0.0)
        for first in range(0, num_patches, PATCHES):
            patch = first + tl.arange(0, PATCHES)
            won = tl.where(winner[:, None] == patch[None, :], share[:, None], 0.0)
            some_patches = right.load([image * num_patches + first, start])
            total = tl.dot(won.to(some_patches.dtype), some_patches, total, input_precision="tf32")
        winners += num_words
        shares += num_words
    number = start + tl.arange(0, DIM)
    to = gradient + word.to(tl.int64)[:, None] * dim + number[None, :]
    tl.store(to, total, mask=(word < num_words)[:, None] & (number < dim)[None, :])


def largest_scores(
    patches: Tensor, words: Tensor, *, dtype: torch.dtype, activated: bool
) -> tuple[Tensor, Tensor]:
    """The largest score of each word over an image's patches, float32, and its patch, int16."""
    images, count, _ = patches.shape
    left, right = operands(patches.flatten(0, 1), words, dtype=dtype)
    values = patches.new_empty((images, len(words)), dtype=torch.float32)
    winners = torch.empty_like(values, dtype=torch.int16)
    tiles = tiles_for(dtype)
    if values.numel():
        allow_descriptors(patches.device)
        loudest_patches[(images * triton.cdiv(len(words), tiles.words),)](
            *(left, right, values, winners, images, count, len(words), left.shape[1]),
            **_sizes(tiles),
            ACTIVATED=activated,
        )
    return values, winners


def largest_scores_gradient(
    patches: Tensor,
    words: Tensor,
    winners: Tensor,
    share: Tensor,
    *,
    dtype: torch.dtype,
    of_patches: bool,
    of_words: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of the sum of scores times `share`, float32, in patches and in words where wanted."""
    images, count, dim = patches.shape
    left, right = operands(patches.flatten(0, 1), words, dtype=dtype)
    # Half precision holds a share of the largest one.
    unit = share.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) / HALF_RANGE
    shares = (share / unit).float().contiguous()
    sizes = (images, count, len(words), left.shape[1])
    tiles = tiles_for(dtype)
    steps = triton.cdiv(left.shape[1], tiles.dim)
    found: list[Tensor | None] = [None, None]
    allow_descriptors(patches.device)
    if of_patches:
        total = torch.zeros_like(left, dtype=torch.float32)
        gradient_of_patches[(images * triton.cdiv(count, tiles.patches) * steps,)](
            *(winners, shares, right, total, *sizes), **_sizes(tiles)
        )
        found[0] = (total[:, :dim] * unit).view(images, count, dim)
    if of_words:
        total = torch.zeros_like(right, dtype=torch.float32)
        gradient_of_words[(triton.cdiv(len(words), tiles.words) * steps,)](
            *(winners, shares, left, total, *sizes), **_sizes(tiles)
        )
        found[1] = total[:, :dim] * unit
    return found[0], found[1]


def tiles_for(dtype: torch.dtype) -> Tiles:
    """Float32 takes tiles of half the width."""
    return Tiles() if dtype.itemsize == 2 else Tiles(dim=32)


def _sizes(tiles: Tiles) -> dict[str, int]:
    return {
        "PATCHES": tiles.patches,
        "WORDS": tiles.words,
        "DIM": tiles.dim,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
