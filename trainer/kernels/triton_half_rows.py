"""AdamW for some rows of a table in bfloat16 on a GPU: each number is read and written once.

What belongs to a row (its step's size, its decay, its chance) was worked out before; a program
moves the numbers of one row, and rounds them at random by a hash of their places.
"""

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import BFloat16, Float32, Int64
from torch import Tensor

MOST_NUMBERS = 512
"""Of a row at once: few enough for registers; with 1024 a processor holds seven programs."""
SQUARE_SHIFT = 21
"""Bits of a float32 below those that a mean square keeps in its byte."""
SQUARE_LOWEST = (127 - 53) << 2
"""What is taken off those that it keeps. Both as in `trainer.parts.half_rows`, for CPUs."""


@triton.jit
def adamw_of_half_rows(  # type: ignore[no-untyped-def]
    rows,
    means,
    squares,
    gradient,
    places,
    kepts,
    sizes,
    corrections,
    noises,
    dim,
    share,
    beta_square,
    square_share,
    epsilon,
    SHIFT: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """One row of the table, and its moments."""
    touched = tl.program_id(0).to(tl.int64)
    row = tl.load(places + touched) if HAS_PLACES else touched
    kept, size = tl.load(kepts + touched), tl.load(sizes + touched)
    correction, noise = tl.load(corrections + touched), tl.load(noises + touched).to(tl.uint32)
    for start in range(0, dim, NUMBERS):
        column = start + tl.arange(0, NUMBERS)
        inside = column < dim
        at = row * dim + column
        slope = tl.load(gradient + touched * dim + column, mask=inside, other=0.0)
        code = tl.load(squares + at, mask=inside, other=0).to(tl.int32)
        square = ((code + LOWEST) << SHIFT).to(tl.float32, bitcast=True)
        square = tl.where(code > 0, square, 0.0) * beta_square
        square += slope * square_share * slope
        mean = tl.load(means + at, mask=inside, other=0.0).to(tl.float32)
        mean += (slope - mean) * share
        value = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32) * kept
        below = tl.div_rn(tl.sqrt_rn(square), correction) + epsilon
        value -= tl.div_rn(mean, below) * size
        bits = noise + column.to(tl.uint32) * 0x9E3779B9
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        bits = bits ^ (bits >> 16)
        tl.store(rows + at, rounded(value, bits & 0xFFFF), mask=inside)
        tl.store(means + at, rounded(mean, bits >> 16), mask=inside)
        code = ((square.to(tl.uint32, bitcast=True) + (bits >> 11)) >> SHIFT).to(tl.int32) - LOWEST
        code = tl.minimum(tl.maximum(code, 1), 255)
        tl.store(squares + at, tl.where(square > 0, code, 0).to(tl.uint8), mask=inside)


@triton.jit
def rounded(values, chance):  # type: ignore[no-untyped-def]
    """To one of the two neighbours in bfloat16; to the larger where the chance carries into it."""
    bits = (values.to(tl.uint32, bitcast=True) + chance) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


def move_half_rows(
    rows: BFloat16[Tensor, "rows dim"],
    moments: dict[str, Tensor],
    gradient: Float32[Tensor, "touched dim"],
    places: Int64[Tensor, " touched"] | None,
    *,
    kept: Float32[Tensor, " touched"],
    sizes: Float32[Tensor, " touched"],
    corrections: Float32[Tensor, " touched"],
    noise: Int64[Tensor, " touched"],
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """In place: rows * kept - sizes * mean / (sqrt(square) / corrections + epsilon), of the moments
    after this gradient, all rounded by 32 random bits a row. Places are distinct; None is all rows
    in order."""
    if not gradient.numel():
        return
    dim = rows.shape[1]
    adamw_of_half_rows[(gradient.shape[0],)](
        *(rows, moments["exp_avg"], moments["exp_avg_sq"], gradient.contiguous()),
        *(gradient if places is None else places, kept, sizes, corrections, noise, dim),
        *(1 - betas[0], betas[1], 1 - betas[1], epsilon),
        SHIFT=SQUARE_SHIFT,
        LOWEST=SQUARE_LOWEST,
        HAS_PLACES=places is not None,
        NUMBERS=min(MOST_NUMBERS, triton.next_power_of_2(dim)),
        num_warps=4,
    )
