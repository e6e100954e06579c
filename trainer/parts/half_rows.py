"""AdamW for rows of a table in less than half the memory: 5 bytes a number where float32 takes 12.

Rows and their mean gradients are bfloat16, mean squares have a byte: an exponent of six bits, two
of mantissa. Each is rounded up or down at random, with the odds that keep its expectation, or what
is smaller than the last bit would all be lost. The chance is a hash of seed, row and the row's own
count of steps: the same for any division of a table over ranks, and after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import BFloat16, Float, Float32, Int64, UInt8
from torch import Tensor

from trainer.hashing import hash_bits, key_of
from trainer.parts.row_optimizer import Places, RowOptimizer, RowOptimizerConfig

CHUNK_NUMBERS = 1 << 16
"""Numbers updated at a time on a host: their 64-bit hashes stay in the cache."""
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
SQUARE_SHIFT = 21
"""Bits of a float32 below those that a mean square keeps in its byte."""
SQUARE_LOWEST = (127 - 53) << 2
"""What is taken off those that it keeps: the least is a little above 2^-53, the square of the usual
epsilon; the largest is 1792."""
_MIXERS = (0x85EBCA6B, 0xC2B2AE35)
"""Of MurmurHash3's finaliser, which spreads 32 bits."""


class HalfRowOptimizer:
    """As `RowOptimizer`, whose interface it has: rows move in place, and what is remembered."""

    def __init__(
        self,
        rows: Float[Tensor, "rows dim"],
        config: RowOptimizerConfig,
        *,
        first: int = 0,
        seed: int = 0,
    ) -> None:
        """Of the whole table's rows from the number `first` on."""
        self.config = config
        self.rows = rows.to(torch.bfloat16)
        self.moments = {
            "exp_avg": torch.zeros_like(self.rows),
            "exp_avg_sq": torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device),
        }
        self.steps = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        """Updates of each row."""
        self.log_decay = 0.0
        """Of a row that has paid everything since the first step."""
        self.paid = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        """The part of it that each row has paid."""
        self._first, self.seed = first, seed

    def taken(self, places: Places) -> Float32[Tensor, "touched dim"]:
        """These rows after the decay that they owe, in float32; they are not rounded for it."""
        rows = self.rows if places is None else self.rows.index_select(0, places)
        return rows.float().mul_(self._owed(places)[:, None])

    def update(
        self, places: Places, gradient: Float32[Tensor, "touched dim"], *, factor: float
    ) -> None:
        """One step on the rows at these places (each once), with the learning rate times `factor`.
        The gradient's memory is used up."""
        rate = self.config.learning_rate * factor
        kept = self._owed(places).mul_(1 - rate * self.config.weight_decay)
        sizes, corrections = self._of_counts(places, rate)
        noise = self._noise(places)
        if self._by_kernel:
            self._launch(places, gradient, kept, sizes, corrections, noise)
        else:
            for some in self._pieces(len(gradient)):
                chosen = some if places is None else places[some]
                each = (values[some] for values in (kept, sizes, corrections, noise))
                self._move(chosen, gradient[some], *each)
        self.log_decay += math.log1p(-rate * self.config.weight_decay)
        self.paid[slice(None) if places is None else places] = self.log_decay

    def _pieces(self, count: int) -> Iterator[slice]:
        size = max(1, CHUNK_NUMBERS // max(1, self.rows.shape[1]))
        return (slice(at, min(at + size, count)) for at in range(0, count, size))

    def _owed(self, places: Places) -> Float32[Tensor, " touched"]:
        paid = self.paid if places is None else self.paid[places]
        return (self.log_decay - paid).exp_().float()

    def _of_counts(self, places: Places, rate: float) -> tuple[Tensor, Tensor]:
        """The size of each row's step, and what the root of its mean squares is divided by; counts
        the step."""
        chosen = slice(None) if places is None else places
        steps = self.steps[chosen] + 1
        self.steps[chosen] = steps
        (beta, beta_square), counts = self.config.betas, steps.double()
        correction = (1 - beta_square**counts).sqrt().float()
        return (rate / (1 - beta**counts)).float(), correction

    def _noise(self, places: Places) -> Int64[Tensor, " touched"]:
        """32 bits of chance for each of the rows in this step of theirs."""
        numbers = torch.arange(len(self.rows), device=self.rows.device)
        chosen = numbers if places is None else places
        key = key_of("rounding", self.seed)
        return hash_bits(chosen + self._first, key, self.steps[chosen].long()) & _WORD

    def _move(
        self,
        chosen: Tensor | slice,
        gradient: Tensor,
        kept: Tensor,
        sizes: Tensor,
        corrections: Tensor,
        noise: Tensor,
    ) -> None:
        (beta, beta_square), held = self.config.betas, self.moments
        square = squares_of(held["exp_avg_sq"][chosen]).mul_(beta_square)
        square += gradient * (1 - beta_square) * gradient
        mean = held["exp_avg"][chosen].float()
        mean += gradient.sub_(mean).mul_(1 - beta)
        below = root(square).div_(corrections[:, None]).add_(self.config.epsilon)
        step = mean.div(below).mul_(sizes[:, None])
        bits = spread(noise, gradient.shape[1])
        rows = self.rows[chosen].float().mul_(kept[:, None]).sub_(step)
        self.rows[chosen] = rounded(rows, bits & 0xFFFF)
        held["exp_avg"][chosen] = rounded(mean, bits >> 16)
        held["exp_avg_sq"][chosen] = codes_of(square, bits >> 11)

    @property
    def _by_kernel(self) -> bool:
        return self.rows.device.type == "cuda"

    def _launch(
        self,
        places: Places,
        gradient: Tensor,
        kept: Tensor,
        sizes: Tensor,
        corrections: Tensor,
        noise: Tensor,
    ) -> None:
        from trainer.kernels.triton_half_rows import move_half_rows  # Triton is where GPUs are

        move_half_rows(
            *(self.rows, self.moments, gradient, places),
            kept=kept,
            sizes=sizes,
            corrections=corrections,
            noise=noise,
            betas=self.config.betas,
            epsilon=self.config.epsilon,
        )


def row_optimizer(
    rows: Float[Tensor, "rows dim"], config: RowOptimizerConfig, *, first: int, seed: int
) -> RowOptimizer | HalfRowOptimizer:
    """The optimizer that holds rows as the configuration says."""
    if config.rows == "bfloat16":
        return HalfRowOptimizer(rows, config, first=first, seed=seed)
    return RowOptimizer(rows, config)


def spread(noise: Int64[Tensor, " rows"], dim: int) -> Int64[Tensor, "rows {dim}"]:
    """32 bits for each of `dim` numbers of each row, of 32 bits a row."""
    columns = torch.arange(dim, device=noise.device) * _GOLDEN
    bits = (noise[:, None] + columns) & _WORD
    for shift, mixer in zip((16, 13), _MIXERS, strict=True):
        bits = ((bits ^ (bits >> shift)) * mixer) & _WORD
    return bits ^ (bits >> 16)


def rounded(
    values: Float32[Tensor, "rows dim"], chance: Int64[Tensor, "rows dim"]
) -> BFloat16[Tensor, "rows dim"]:
    """To one of the two neighbours in bfloat16; to the larger where 16 bits of chance carry."""
    bits = values.view(torch.int32) + chance.to(torch.int32)
    return bits.bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


def root(values: Float32[Tensor, "rows dim"]) -> Float32[Tensor, "rows dim"]:
    """Torch's own, which on some CPUs is off by a bit at times; a GPU's is exact."""
    return values.sqrt()


def squares_of(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """What a byte stands for; 0 is zero, and else four steps are a doubling."""
    bits = (codes.to(torch.int32) + SQUARE_LOWEST) << SQUARE_SHIFT
    return torch.where(codes > 0, bits.view(torch.float32), 0.0)


def codes_of(
    squares: Float32[Tensor, "rows dim"], chance: Int64[Tensor, "rows dim"]
) -> UInt8[Tensor, "rows dim"]:
    """One of the two neighbours among `squares_of`; to the larger where 21 bits of chance carry.
    Beyond the ends stands for the end, and only zero for zero."""
    bits = (squares.view(torch.int32) + chance.to(torch.int32)) >> SQUARE_SHIFT
    codes = (bits - SQUARE_LOWEST).clamp_(1, 255)
    return torch.where(squares > 0, codes, 0).to(torch.uint8)
