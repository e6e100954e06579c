"""AdamW for some rows of a table in bfloat16 on a GPU: each number is read and written once.

What belongs to a row (its step's size, its decay, its chance) was worked out before; a program
moves the numbers of one row, and rounds them at random by a hash of their places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

MOST_NUMBERS = 1024
"""Of a row at once: few enough for registers."""


@triton.jit
def adamw_of_half_rows(  # type: ignore[no-untyped-def]
    rows,
    means,
    gradient,
    places,
    kepts,
    sizes,
    noises,
    dim,
    share,
    HAS_PLACES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """One row of the table, and its mean gradient."""
    touched = tl.program_id(0).to(tl.int64)
    row = tl.load(places + touched) if HAS_PLACES else touched
    kept, size = tl.load(kepts + touched), tl.load(sizes + touched)
    noise = tl.load(noises + touched).to(tl.uint32)
    for start in range(0, dim, NUMBERS):
        column = start + tl.arange(0, NUMBERS)
        inside = column < dim
        at = row * dim + column
        slope = tl.load(gradient + touched * dim + column, mask=inside, other=0.0)
        mean = tl.load(means + at, mask=inside, other=0.0).to(tl.float32)
        mean += (slope - mean) * share
        value = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32) * kept
        value -= mean * size
        bits = noise + column.to(tl.uint32) * 0x9E3779B9
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        bits = bits ^ (bits >> 16)
        tl.store(rows + at, rounded(value, bits & 0xFFFF), mask=inside)
        tl.store(means + at, rounded(mean, bits >> 16), mask=inside)


@triton.jit
def rounded(values, chance):  # type: ignore[no-untyped-def]
    """To one of the two neighbours in bfloat16; to the larger where the chance carries into it."""
    bits = (values.to(tl.uint32, bitcast=True) + chance) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


def move_half_rows(
    rows: BFloat16[Tensor, "rows dim"],
    means: BFloat16[Tensor, "rows dim"],
    gradient: Float32[Tensor, "touched dim"],
    places: Int64[Tensor, " touched"] | None,
    *,
    kept: Float32[Tensor, " touched"],
    sizes: Float32[Tensor, " touched"],
    noise: Int64[Tensor, " touched"],
    share: float,
) -> None:
    """In place: means + (gradient - means) * share, then rows * kept - means * sizes, both rounded
    by 32 random bits a row. Places are distinct; None is all rows in order."""
    if not gradient.numel():
        return
    dim = rows.shape[1]
    adamw_of_half_rows[(gradient.shape[0],)](
        *(rows, means, gradient.contiguous(), gradient if places is None else places),
        *(kept, sizes, noise, dim, share),
        HAS_PLACES=places is not None,
        NUMBERS=min(MOST_NUMBERS, triton.next_power_of_2(dim)),
        num_warps=4,
    )
