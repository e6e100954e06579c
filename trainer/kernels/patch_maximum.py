"""The largest score of each word over an image's patches, without the scores themselves.

An image has hundreds of patches and a vocabulary tens of thousands of words: their scores are
6 GiB for 768 images in bfloat16. Only the largest one of each word counts. Plain torch takes words
in blocks, Triton's kernel keeps scores in registers; what is left is the winning patch, from which
the backward pass goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import ConfigError
from trainer.kernels.way import BEST_WAY, Way

BLOCK_SCORES = 1 << 25
"""Scores that exist at one time: 128 MiB in float32."""
MOST_PATCHES = 1 << 15
"""Of an image: a winner has two bytes."""


def elu1p(scores: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x + 1 where x is not negative, else exp(x): positive, smooth and never decreasing."""
    return torch.where(scores >= 0, scores + 1, scores.clamp_max(0).exp())


def patch_maximum(
    patches: Float[Tensor, "images patches dim"],
    words: Float[Tensor, "words dim"],
    *,
    activated: bool = False,
    block_words: int | None = None,
    way: Way = BEST_WAY,
) -> Float[Tensor, "images words"]:
    """max_p patches_ip . words_v, differentiable once in both; LexVLA, equation 4.

    Equals `torch.einsum("ipd,vd->ipv", patches, words).amax(1)`; of patches that tie, the first has
    the gradient. `activated`: elu1p of it, in float32 or better; elu1p never decreases, so that the
    maximum may be taken before it. 2 I P V D FLOPs forward and 4 backward; besides the result a
    winner of 2 bytes a word and image. On a CPU in the inputs' dtype, with one block of scores; on
    a GPU by Triton's kernels, with operands in the way's dtype, sums in float32, and no scores.
    """
    if patches.shape[1] > MOST_PATCHES:
        raise ConfigError(
            f"an image of {patches.shape[1]} patches has more than the {MOST_PATCHES} that can be "
            "told apart; use smaller images or larger patches"
        )
    block = block_words or max(1, BLOCK_SCORES // max(1, patches.shape[0] * patches.shape[1]))
    value: Tensor = _PatchMaximum.apply(patches, words, block, activated, way)
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
    def forward(
        ctx: Any, patches: Tensor, words: Tensor, block: int, activated: bool, way: Way
    ) -> Tensor:
        operands = way.operands(patches.device)
        if operands is None:
            best, winner = best_patches(patches, words, block)
            if activated:
                best = elu1p(best.to(torch.promote_types(best.dtype, torch.float32)))
        else:
            best, winner = _triton_best(patches, words, operands, activated)
        ctx.save_for_backward(patches, words, winner, best if activated else None)
        ctx.block, ctx.operands = block, operands
        return best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """A score's gradient goes to its winner: a sparse matrix [patches, words] of each image."""
        patches, words, winner, value = ctx.saved_tensors
        if value is not None:  # elu1p's slope is its value below one, and one above
            gradient = gradient * value.clamp_max(1)
        arguments = (patches, words, winner, gradient, ctx.needs_input_grad[:2])
        if ctx.operands is None:
            of_both = _torch_gradients(*arguments, ctx.block)
        else:
            of_both = _triton_gradients(*arguments, ctx.operands)
        return *of_both, None, None, None


def _torch_gradients(
    patches: Tensor,
    words: Tensor,
    winner: Tensor,
    gradient: Tensor,
    wanted: tuple[bool, bool],
    block: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Made dense for one block of words."""
    for_patches = torch.zeros_like(patches) if wanted[0] else None
    for_words = torch.zeros_like(words) if wanted[1] else None
    for first in range(0, words.shape[0], block):
        columns = slice(first, first + block)
        share = gradient[:, columns].to(patches.dtype)
        scores = share.new_zeros(*patches.shape[:2], share.shape[1])
        scores.scatter_(1, winner[:, None, columns].long(), share[:, None])
        if for_patches is not None:
            for_patches += scores @ words[columns]
        if for_words is not None:
            for_words[columns] = scores.flatten(0, 1).T @ patches.flatten(0, 1)
    return for_patches, for_words


def _triton_best(
    patches: Tensor, words: Tensor, operands: torch.dtype, activated: bool
) -> tuple[Tensor, Tensor]:
    from trainer.kernels import triton_patches

    value, winner = triton_patches.largest_scores(
        patches, words, dtype=operands, activated=activated
    )
    return value if activated else value.to(patches.dtype), winner


def _triton_gradients(
    patches: Tensor,
    words: Tensor,
    winner: Tensor,
    gradient: Tensor,
    wanted: tuple[bool, bool],
    operands: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    from trainer.kernels import triton_patches

    of_patches, of_words = triton_patches.largest_scores_gradient(
        *(patches, words, winner, gradient),
        dtype=operands,
        of_patches=wanted[0],
        of_words=wanted[1],
    )
    return (
        None if of_patches is None else of_patches.to(patches.dtype),
        None if of_words is None else of_words.to(words.dtype),
    )
