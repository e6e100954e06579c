"""AdamW for some rows of a table on a GPU: each number is read and written once.

In torch's operations the rows, their moments and every intermediate pass through memory of their
own: 60 launches and 15 times the bytes. Here a program moves one row, in place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

MOST_NUMBERS = 1024
"""Of a row at once: few enough for registers."""


@triton.jit
def adamw_of_rows(  # type: ignore[no-untyped-def]
    rows,
    means,
    squares,
    gradient,
    places,
    sizes,
    corrections,
    dim,
    kept,
    share,
    beta_square,
    square_share,
    epsilon,
    HAS_PLACES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """One row of the table, and its moments."""
    touched = tl.program_id(0).to(tl.int64)
    row = tl.load(places + touched) if HAS_PLACES else touched
    size, correction = tl.load(sizes + touched), tl.load(corrections + touched)
    for start in range(0, dim, NUMBERS):
        column = start + tl.arange(0, NUMBERS)
        inside = column < dim
        at = row * dim + column
        slope = tl.load(gradient + touched * dim + column, mask=inside, other=0.0)
        mean = tl.load(means + at, mask=inside, other=0.0)
        mean += share * (slope - mean)
        square = tl.load(squares + at, mask=inside, other=0.0) * beta_square
        square += square_share * slope * slope
        value = tl.load(rows + at, mask=inside, other=0.0) * kept
        below = tl.div_rn(tl.sqrt_rn(square), correction) + epsilon
        tl.store(rows + at, value - tl.div_rn(mean, below) * size, mask=inside)
        tl.store(means + at, mean, mask=inside)
        tl.store(squares + at, square, mask=inside)


def update_rows(
    rows: Float[Tensor, "rows dim"],
    moments: dict[str, Float[Tensor, "rows dim"]],
    gradient: Float[Tensor, "touched dim"],
    places: Int64[Tensor, " touched"] | None,
    *,
    sizes: Float[Tensor, " touched"],
    corrections: Float[Tensor, " touched"],
    kept: float,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """In place: rows * kept - sizes * mean / (sqrt(square) / corrections + epsilon), float32, of
    the moments after this gradient. Places are distinct; None is all rows in order."""
    if not gradient.numel():
        return
    dim = rows.shape[1]
    adamw_of_rows[(gradient.shape[0],)](
        *(rows, moments["exp_avg"], moments["exp_avg_sq"], gradient.contiguous()),
        *(gradient if places is None else places, sizes, corrections, dim),
        *(kept, 1 - betas[0], betas[1], 1 - betas[1], epsilon),
        HAS_PLACES=places is not None,
        NUMBERS=min(MOST_NUMBERS, triton.next_power_of_2(dim)),
        num_warps=4,
    )
