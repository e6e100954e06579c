"""Non-negative vectors over a vocabulary: every coordinate is a word (LexVLA, section 3)."""

from __future__ import annotations

from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from trainer.kernels.patch_maximum import elu1p
from trainer.losses.units import at_least_float32

__all__ = ["elu1p", "largest_sparse", "lexical_rows", "threshold_sparse"]


def lexical_rows(scores: Float[Tensor, "rows words"]) -> Float[Tensor, "rows words"]:
    """Unit vectors over the words, in float32 or better: `normalize(elu1p(scores))`.

    Scores of an image are the largest over its patches; elu1p never decreases, so that the
    maximum may be taken before it.
    """
    return normalize(elu1p(at_least_float32(scores)), dim=-1)


def threshold_sparse(rows: Float[Tensor, "rows words"]) -> Float[Tensor, "rows words"]:
    """Coordinates above 1 / sqrt(words), the root mean square of a unit vector; others are zero.

    Strictly above: of a vector that says every word equally, nothing is left. Lengths are not
    made one again.
    """
    return torch.where(rows > 1 / sqrt(rows.shape[-1]), rows, 0.0)


def largest_sparse(rows: Float[Tensor, "rows words"], count: int) -> Float[Tensor, "rows words"]:
    """The `count` largest coordinates of each row; others are zero."""
    if count >= rows.shape[-1]:
        return rows
    values, places = rows.topk(count, dim=-1)
    return torch.zeros_like(rows).scatter_(-1, places, values)
