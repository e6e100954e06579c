"""NMTune's three regularisers of tuned features Z against frozen ones F, over all ranks' rows.

A rank passes its own rows; each value is that of the global batch, the same on every rank, with
exact gradients under the objective "mean over ranks".
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainer.comm import Comm

Mean = Literal["rows", "elements"]


def consistency(
    tuned: Float[Tensor, "n dim"], frozen: Float[Tensor, "n dim"], *, mean: Mean, comm: Comm
) -> Float[Tensor, ""]:
    """|Z/|Z| - F/|F||^2, averaged over rows (the paper) or over elements (the code: 1/D of it).

    No gradient reaches `frozen`.
    """
    gaps = (F.normalize(tuned, dim=1) - F.normalize(frozen.detach(), dim=1)).square().sum()
    count = comm.sum(tuned.new_tensor(float(tuned.shape[0])))
    value = comm.sum(gaps) / count
    return value if mean == "rows" else value / tuned.shape[1]


def covariance(tuned: Float[Tensor, "n dim"], *, comm: Comm) -> Float[Tensor, ""]:
    """Sum of squared off-diagonal entries of the covariance of Z, over D. Needs two rows.

    With K = Zc Zc^T / (M - 1) of the centred rows, |C|^2 = |K|^2, so of the M x M and the D x D
    matrix the smaller one is made; ranks hold M/W rows of K each, or add their D x D sums.
    """
    dim = tuned.shape[1]
    count = comm.sum(tuned.new_tensor(float(tuned.shape[0])))
    centred = tuned - comm.sum(tuned.sum(dim=0)) / count
    variances = comm.sum(centred.square().sum(dim=0)) / (count - 1)
    if float(count) < dim:
        products = centred @ _gathered(centred, comm).T / (count - 1)
        squares = comm.sum(products.square().sum())
    else:
        squares = (comm.sum(centred.T @ centred) / (count - 1)).square().sum()
    value: Tensor = (squares - variances.square().sum()) / dim
    return value


def dominance(tuned: Float[Tensor, "n dim"], *, top: int, comm: Comm) -> Float[Tensor, ""]:
    """Minus the mean share of the `top` largest singular values of Z, uncentred, in their sum.

    `top` is 1 in the paper and 5 in the code; fewer where Z has fewer. Smallest, -1, at rank one.
    """
    values = torch.linalg.svdvals(_gathered(tuned, comm))
    count = int(comm.sum(torch.tensor(tuned.shape[0], device=tuned.device)))
    values = values[: min(count, tuned.shape[1])]
    value: Tensor = -(values[:top] / values.sum()).mean()
    return value


def _gathered(rows: Tensor, comm: Comm) -> Tensor:
    """All ranks' rows, with gradient. Where a rank has fewer, zero rows fill up: they add nothing
    to a product, and no singular value other than zero."""
    most = int(comm.max(torch.tensor(rows.shape[0], device=rows.device)))
    return comm.all_gather(F.pad(rows, (0, 0, 0, most - rows.shape[0])))
