"""How a feature matrix spreads: its singular values, streamed exactly through D x D sums.

p_i = sigma_i / sum sigma.  SVE = -sum p ln p (arXiv 2309.17002, eq. 2): how many directions matter.
LSVR = -ln p_1 (eq. 3): how little the strongest one dominates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import DataError

Rows = Literal["raw", "unit", "unit_row_centred"]
"""`unit_row_centred` takes each unit row's own mean off, as the published scripts do. It is no
centring of features."""


class Moments(NamedTuple):
    """Sums over rows, in float64: 8 (D^2 + D) bytes whatever their number. They add."""

    num_rows: int
    total: Float64[Tensor, " dim"]
    products: Float64[Tensor, "dim dim"]

    @classmethod
    def none(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        zeros = torch.zeros(dim, dim + 1, dtype=torch.float64, device=device)
        return cls(0, zeros[:, 0], zeros[:, 1:])

    def plus(self, rows: Float[Tensor, "n dim"]) -> Moments:
        """With these rows too."""
        wide = rows.double()
        return Moments(
            self.num_rows + len(rows), self.total + wide.sum(dim=0), self.products + wide.T @ wide
        )

    def merged(self, other: Moments) -> Moments:
        return Moments(
            self.num_rows + other.num_rows, self.total + other.total, self.products + other.products
        )

    def over(self, comm: Comm) -> Moments:
        """Of all ranks' rows."""
        count = comm.sum(torch.tensor(self.num_rows, device=self.total.device))
        return Moments(int(count), comm.sum(self.total), comm.sum(self.products))


class Spectrum(NamedTuple):
    singular_values: Float64[Tensor, " values"]
    """Largest first; min(rows, dim) of them."""
    sve: float
    lsvr: float


def moments_of(blocks: Iterable[Float[Tensor, "_ dim"]], *, dim: int, rows: Rows) -> Moments:
    """The sums over all blocks of rows, each prepared as `rows` says."""
    found = Moments.none(dim)
    for block in blocks:
        found = found.plus(prepared(block.double(), rows))
    return found


def prepared(block: Float[Tensor, "n dim"], rows: Rows) -> Float[Tensor, "n dim"]:
    if rows == "raw":
        return block
    unit = F.normalize(block, dim=1)
    return unit - unit.mean(dim=1, keepdim=True) if rows == "unit_row_centred" else unit


def spectrum(moments: Moments, *, column_centred: bool = False) -> Spectrum:
    """The singular values of the matrix of all rows, and what they say.

    `column_centred` takes the mean row off first. Without it the mean is a direction of its own and
    can outweigh all others: look at both. Equal to a singular value decomposition of the rows up to
    rounding: values below 1e-8 of the largest are noise. DataError without a row other than zero.
    """
    count, total, products = moments
    if column_centred and count:
        products = products - torch.outer(total, total) / count
    values = torch.linalg.eigvalsh(products).flip(0).clamp(min=0).sqrt()
    values = values[: min(count, len(total))]
    if not values.numel() or not float(values[0]) > 0:
        raise DataError(
            f"{count} rows of features have no spectrum: nothing is left but zeros; look at the "
            "store, or measure without centring"
        )
    share = values / values.sum()
    return Spectrum(values, float(torch.special.entr(share).sum()), float(-share[0].log()))
