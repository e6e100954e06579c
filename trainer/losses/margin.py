"""What a positive has to be better by: margins on cosines, and draws of coordinates."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.errors import ConfigError
from trainer.hashing import permutation

MarginKind = Literal["cosine", "angular", "straight_through"]


class Margin(NamedTuple):
    """Makes the cosine of a positive smaller before the loss sees it.

    cosine: c - m (CosFace, arXiv 1801.09414). angular: cos(arccos c + m) with its true derivative
    sin(angle + m) / sin(angle) (ArcFace, arXiv 1801.07698). straight_through: the same value with
    derivative one, which is what the published implementation does.

    Past angle + m = pi the angular value rises again; nothing guards against it, as there.
    """

    kind: MarginKind = "cosine"
    size: float = 0.3
    """A cosine, or an angle in radians."""

    def __call__(self, cosines: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.kind == "cosine":
            return cosines - self.size
        if self.kind == "angular":
            return _turned(cosines, self.size)
        return cosines + (_turned(cosines, self.size) - cosines).detach()


NO_MARGIN = Margin("cosine", 0.0)


def _turned(cosines: Tensor, angle: float) -> Tensor:
    """cos(arccos c + angle) without arccos, whose derivative at one is infinite.

    There the derivative of the sine is infinite too: it is cut off, not left to become NaN.
    """
    smallest = torch.finfo(cosines.dtype).eps
    sines = (1 - cosines.square()).clamp_min(smallest).sqrt()
    return cosines * math.cos(angle) - sines * math.sin(angle)


def coordinate_subset(dim: int, count: int, *keys: int) -> Int64[Tensor, " count"]:
    """`count` of `dim` coordinates, ascending: the same on every rank for the same keys.

    Features and rows are cut to them before either is normalised, so that the loss compares
    directions in a random subspace (UNICOM, arXiv 2304.05884). `count` = `dim` cuts nothing.
    """
    if not 0 < count <= dim:
        raise ConfigError(f"{count} coordinates of {dim} can't be kept; keep 1 to {dim}")
    return permutation(dim, *keys)[:count].sort().values
