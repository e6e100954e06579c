"""Codes of an image's patches as one vector that says how often each occurs.

Numbers of codes are names: their distance means nothing. A k-means over the raw numbers, as
published programs run it, changes when the codebook is written in another order. This does not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize


def bag_of_codes(
    codes: Int64[Tensor, "images patches"], num_codes: int
) -> Float32[Tensor, "images codes"]:
    """Roots of the shares of the codes: unit vectors, whose cosine is the overlap of two images'
    histograms (Bhattacharyya's coefficient)."""
    counts = torch.zeros(len(codes), num_codes)
    counts.scatter_add_(1, codes, torch.ones(codes.shape))
    return normalize(counts.sqrt(), dim=1)
