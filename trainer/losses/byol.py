"""BYOL: a prediction of what a momentum copy says of the same image (arXiv 2006.07733)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def byol_loss(
    predicted: Float[Tensor, "batch views dim"], target: Float[Tensor, "batch dim"]
) -> Float[Tensor, ""]:
    """2 - 2 cos between each view's prediction and the copy's projection (equation 2).

    Rows are unit vectors. The mean over this rank's rows and views; between 0, where all agree, and
    4. No gradient reaches the target.
    """
    cosines = (predicted * target.detach()[:, None]).sum(dim=2)
    return (2 - 2 * cosines).mean()
