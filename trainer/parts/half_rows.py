"""AdamW for rows of a table in half the memory: 4 bytes a number where float32 takes 12.

Rows and their mean gradients are bfloat16. Each is rounded up or down at random, with the odds that
keep its expectation, or steps smaller than the last bit would all be lost. The chance is a hash of
seed, row and the row's own count of steps: the same for any division of a table over ranks, and
after a restart. A row has one mean square, over its numbers and the steps (arXiv 2406.16793).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import BFloat16, Float, Float32, Int64
from torch import Tensor

from trainer.hashing import hash_bits, key_of
from trainer.parts.row_optimizer import Places, RowOptimizer, RowOptimizerConfig

CHUNK_NUMBERS = 1 << 16
"""Numbers updated at a time on a host: their 64-bit hashes stay in the cache."""
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
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
            "exp_avg_sq": torch.zeros(len(rows), device=rows.device),
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
        sizes, noise = self._sizes(places, gradient, rate), self._noise(places)
        if self._by_kernel:
            self._launch(places, gradient, kept, sizes, noise)
        else:
            for some in self._pieces(len(gradient)):
                chosen = some if places is None else places[some]
                self._move(chosen, gradient[some], kept[some], sizes[some], noise[some])
        self.log_decay += math.log1p(-rate * self.config.weight_decay)
        self.paid[slice(None) if places is None else places] = self.log_decay

    def _pieces(self, count: int) -> Iterator[slice]:
        size = max(1, CHUNK_NUMBERS // max(1, self.rows.shape[1]))
        return (slice(at, min(at + size, count)) for at in range(0, count, size))

    def _owed(self, places: Places) -> Float32[Tensor, " touched"]:
        paid = self.paid if places is None else self.paid[places]
        return (self.log_decay - paid).exp_().float()

    def _sizes(self, places: Places, gradient: Tensor, rate: float) -> Float32[Tensor, " touched"]:
        """What a row's mean gradient is multiplied by; counts the step and its mean square."""
        chosen = slice(None) if places is None else places
        (beta, beta_square), config = self.config.betas, self.config
        square = torch.linalg.vector_norm(gradient, dim=1).square_().div_(gradient.shape[1])
        square = self.moments["exp_avg_sq"][chosen].lerp_(square, 1 - beta_square)
        steps = self.steps[chosen] + 1
        self.moments["exp_avg_sq"][chosen], self.steps[chosen] = square, steps
        counts = steps.double()
        below = (square.double() / (1 - beta_square**counts)).sqrt_().add_(config.epsilon)
        return (rate / (1 - beta**counts) / below).float()

    def _noise(self, places: Places) -> Int64[Tensor, " touched"]:
        """32 bits of chance for each of the rows in this step of theirs."""
        numbers = torch.arange(len(self.rows), device=self.rows.device)
        chosen = numbers if places is None else places
        key = key_of("rounding", self.seed)
        return hash_bits(chosen + self._first, key, self.steps[chosen].long()) & _WORD

    def _move(
        self, chosen: Tensor | slice, gradient: Tensor, kept: Tensor, sizes: Tensor, noise: Tensor
    ) -> None:
        mean = self.moments["exp_avg"][chosen].float()
        mean += gradient.sub_(mean).mul_(1 - self.config.betas[0])
        rows = self.rows[chosen].float().mul_(kept[:, None]).sub_(mean * sizes[:, None])
        bits = spread(noise, gradient.shape[1])
        self.rows[chosen] = rounded(rows, bits & 0xFFFF)
        self.moments["exp_avg"][chosen] = rounded(mean, bits >> 16)

    @property
    def _by_kernel(self) -> bool:
        return self.rows.device.type == "cuda"

    def _launch(
        self, places: Places, gradient: Tensor, kept: Tensor, sizes: Tensor, noise: Tensor
    ) -> None:
        from trainer.kernels.triton_half_rows import move_half_rows  # Triton is where GPUs are

        move_half_rows(
            *(self.rows, self.moments["exp_avg"], gradient, places),
            kept=kept,
            sizes=sizes,
            noise=noise,
            share=1 - self.config.betas[0],
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
