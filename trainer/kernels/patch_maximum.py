"""The largest score of each word over an image's patches, without the scores themselves.

An image has hundreds of patches and a vocabulary tens of thousands of words: their scores are
6 GiB for 768 images in bfloat16. Only the largest one of each word counts, so words are taken in
blocks, and what is kept is the winning patch, from which the backward pass goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SCORES = 1 << 25
"""Scores that exist at one time: 128 MiB in float32."""


def patch_maximum(
    patches: Float[Tensor, "images patches dim"],
    words: Float[Tensor, "words dim"],
    *,
    block_words: int | None = None,
) -> Float[Tensor, "images words"]:
    """max_p patches_ip . words_v, differentiable once in both.

    Equals `torch.einsum("ipd,vd->ipv", patches, words).amax(1)`; of patches that tie, the first has
    the gradient. In the dtype of the inputs. 2 I P V D FLOPs forward and 4 backward; besides the
    result a winner of 2 bytes a word and image, and one block of scores. LexVLA, equation 4.
    """
    block = block_words or max(1, BLOCK_SCORES // max(1, patches.shape[0] * patches.shape[1]))
    value: Tensor = _PatchMaximum.apply(patches, words, block)
    return value


def best_patches(
    patches: Float[Tensor, "images patches dim"],
    words: Float[Tensor, "words dim"],
    block: int,
) -> tuple[Float[Tensor, "images words"], Int[Tensor, "images words"]]:
    """The maximum and the first patch that has it, block by block of words."""
    best = patches.new_empty(patches.shape[0], words.shape[0])
    winner = torch.empty(best.shape, dtype=torch.int16, device=patches.device)
    for first in range(0, words.shape[0], block):
        columns = slice(first, first + block)
        value, place = (patches @ words[columns].T).max(dim=1)
        best[:, columns], winner[:, columns] = value, place
    return best, winner


class _PatchMaximum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, words: Tensor, block: int) -> Tensor:
        best, winner = best_patches(patches, words, block)
        ctx.save_for_backward(patches, words, winner)
        ctx.block = block
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """A score's gradient goes to its winner: a sparse matrix [patches, words] of each image,
        made dense for one block of words."""
        patches, words, winner = ctx.saved_tensors
        for_patches = torch.zeros_like(patches) if ctx.needs_input_grad[0] else None
        for_words = torch.zeros_like(words) if ctx.needs_input_grad[1] else None
        for first in range(0, words.shape[0], ctx.block):
            columns = slice(first, first + ctx.block)
            share = gradient[:, columns].to(patches.dtype)
            scores = share.new_zeros(*patches.shape[:2], share.shape[1])
            scores.scatter_(1, winner[:, None, columns].long(), share[:, None])
            if for_patches is not None:
                for_patches += scores @ words[columns]
            if for_words is not None:
                for_words[columns] = scores.flatten(0, 1).T @ patches.flatten(0, 1)
        return for_patches, for_words, None
