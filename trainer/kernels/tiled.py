"""Softmax statistics over very many rows, tile by tile, in plain torch.

The CPU path of the prototype losses and, in float64, the reference for kernels on GPUs. No tensor
of (queries x rows) elements exists: the largest intermediate is one tile, whatever the sizes.

Tiles are [rows, queries], because the three products of a training step are faster in this layout,
and their logits are in base 2, because torch's `exp2` takes a third of the time of `exp`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

Tile = tuple[int, int]
"""Queries and rows of one tile of logits."""

CPU_TILE: Tile = (512, 1024)
"""Two MB in float32: a tile stays in the cache between the product, the exponential and the sum."""
ACCELERATOR_TILE: Tile = (8192, 4096)
"""Enough work per launch; 128 MB in float32."""


class Pairs(NamedTuple):
    """Which (query, row) pairs a softmax counts, and how. By default all of them, as they are."""

    bias: Float[Tensor, " rows"] | None = None
    """Added to a row's logits: -inf where there is no such row, -ln(rate) for a row that was
    drawn at this rate and stands for all."""
    excluded: Int64[Tensor, "queries width"] | None = None
    """Rows, by position, that don't exist for this query. Positions outside the rows are nothing;
    one may occur twice."""
    ceiling: float | None = None
    """A logit above this becomes zero, before the bias, and has no gradient."""
    reference: float | None = None
    """Exponentials are taken relative to this number, not to a running maximum: saves a pass over
    every tile. For logits whose bound is known; `fixed_reference` has one for cosines."""

    def in_base_two(self) -> Pairs:
        """For logits that are multiplied by log2(e)."""
        return self._replace(
            bias=None if self.bias is None else self.bias * LOG2_E,
            ceiling=None if self.ceiling is None else self.ceiling * LOG2_E,
            reference=None if self.reference is None else self.reference * LOG2_E,
        )

    def of_queries(self, part: slice) -> Pairs:
        excluded = None if self.excluded is None else self.excluded[part]
        return self._replace(excluded=excluded)

    def of_rows(self, part: slice) -> Pairs:
        return self._replace(
            bias=None if self.bias is None else self.bias[part],
            excluded=None if self.excluded is None else self.excluded - part.start,
        )


ALL_PAIRS = Pairs()


def fixed_reference(scale: float) -> float | None:
    """A reference for `scale` times cosines, or None where float32 has no room for one.

    With |scale| <= 64 the sum of ten million exponentials lies between e^-64 and e^81, inside of
    float32 without any shift. Up to 80 a shift keeps the top inside; a softmax whose every logit is
    below -64 is then zero.
    """
    bound = abs(scale)
    return None if bound > 80 else max(0.0, bound - 64.0)


class Partition(NamedTuple):
    """What some of the rows contribute to a softmax over all of them; `merge` joins two of these.

    Sums are relative to `peak`, so they neither overflow nor vanish at any scale.
    """

    peak: Float[Tensor, " queries"]
    """Largest logit, -inf where there is no row; or the reference, where one was given."""
    mass: Float[Tensor, " queries"]
    """sum_j exp(logit_j - peak)"""
    weighted: Float[Tensor, "queries width"]
    """sum_j exp(logit_j - peak) value_j; no columns where no values were given."""

    @property
    def log_partition(self) -> Float[Tensor, " queries"]:
        """logsumexp_j(logit_j); -inf where there is no row."""
        return self.peak + self.mass.log()

    @property
    def mean(self) -> Float[Tensor, "queries width"]:
        """The values averaged under the softmax; zero where there is no row."""
        tiny = torch.finfo(self.mass.dtype).tiny
        return self.weighted / self.mass.clamp_min(tiny)[:, None]


def finite(peak: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The peak as something to subtract: -inf - -inf would be NaN."""
    return peak.clamp_min(torch.finfo(peak.dtype).min)


def merge(one: Partition, other: Partition) -> Partition:
    """The statistics of two disjoint sets of rows together. Associative, order does not matter."""
    peak = torch.maximum(one.peak, other.peak)
    first, second = (one.peak - finite(peak)).exp(), (other.peak - finite(peak)).exp()
    return Partition(
        peak,
        one.mass * first + other.mass * second,
        one.weighted * first[:, None] + other.weighted * second[:, None],
    )


def partition_sums(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "rows dim"],
    values: Float[Tensor, "rows width"] | None = None,
    *,
    scale: Float[Tensor, ""] | float,
    valid: Bool[Tensor, " rows"] | None = None,
    pairs: Pairs = ALL_PAIRS,
    tile: Tile | None = None,
) -> Partition:
    """Softmax statistics of the logits `scale * queries @ keys.T`, and of `values` under them.

    Equals `logsumexp(logits)` and `softmax(logits) @ values` for the matrix that is never built.
    Rows that are not valid do not exist. Values of logits above the ceiling are left out of the
    weighted sum, not of the mass. Not differentiable; accumulates in the inputs' dtype.

    Cost: 2 * queries * rows * (dim + width) FLOPs; memory of one tile besides the results.
    """
    num_queries, num_rows = tile or _default_tile(queries)
    values = keys[:, :0] if values is None else values
    pairs = without_invalid(pairs, valid, queries.dtype).in_base_two()
    scaled = queries.detach() * (scale * LOG2_E)
    chunks = [
        _over_rows(scaled[some], keys, values, pairs.of_queries(some), num_rows)
        for some in _slices(queries.shape[0], num_queries) or [slice(0, 0)]
    ]
    peak, mass, weighted = (torch.cat(column) for column in zip(*chunks, strict=True))
    return Partition(peak.mul_(LN_2), mass, weighted)


def _default_tile(queries: Tensor) -> Tile:
    return CPU_TILE if queries.device.type == "cpu" else ACCELERATOR_TILE


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


class _Sums(NamedTuple):
    """As `Partition`, with the peak in base 2."""

    peak: Tensor
    mass: Tensor
    weighted: Tensor


def _over_rows(scaled: Tensor, keys: Tensor, values: Tensor, pairs: Pairs, num_rows: int) -> _Sums:
    start = -torch.inf if pairs.reference is None else pairs.reference
    total = _Sums(
        scaled.new_full((scaled.shape[0],), start),
        scaled.new_zeros(scaled.shape[0]),
        scaled.new_zeros(scaled.shape[0], values.shape[1]),
    )
    for part in _slices(keys.shape[0], num_rows):
        logits, above = tile_logits(scaled, keys[part], pairs.of_rows(part))
        if pairs.reference is None:
            total = _below(total, torch.maximum(total.peak, logits.amax(dim=0)))
        if pairs.reference != 0.0:
            logits.sub_(finite(total.peak))
        weights = logits.exp2_()
        total.mass.add_(weights.sum(dim=0))
        if above is not None:
            weights.masked_fill_(above, 0.0)
        # Not accumulated inside of the product, where a small number would vanish in a large sum.
        total.weighted.add_(weights.T @ values[part])
    return total


def _below(total: _Sums, peak: Tensor) -> _Sums:
    """The sums relative to a higher peak."""
    shrunk = (total.peak - finite(peak)).exp2_()
    return _Sums(peak, total.mass.mul_(shrunk), total.weighted.mul_(shrunk[:, None]))


def tile_logits(
    scaled: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "rows dim"],
    pairs: Pairs,
    *,
    out: Float[Tensor, "rows queries"] | None = None,
) -> tuple[Float[Tensor, "rows queries"], Bool[Tensor, "rows queries"] | None]:
    """The logits of one tile, and which of them were above the ceiling (None: there is none).

    `scaled` queries and `pairs` in one base; logits are written to `out`, where given.
    """
    above = None
    if pairs.ceiling is not None:
        logits = torch.mm(keys, scaled.T, out=out)
        above = logits > pairs.ceiling
        logits.masked_fill_(above, 0.0)
        logits = logits if pairs.bias is None else logits.add_(pairs.bias[:, None])
    elif pairs.bias is not None:
        logits = torch.addmm(pairs.bias[:, None], keys, scaled.T, out=out)
    else:
        logits = torch.mm(keys, scaled.T, out=out)
    if pairs.excluded is not None:
        _exclude(logits, pairs.excluded.T)
    return logits, above


def _exclude(logits: Tensor, positions: Tensor) -> None:
    """Adds -inf at the positions inside of the tile. An addition can be repeated, and needs no
    list of the pairs that hit this tile, whose length a device would have to report."""
    inside = (positions >= 0) & (positions < logits.shape[0])
    shift = torch.where(inside, -torch.inf, 0.0).to(logits.dtype)
    logits.scatter_add_(0, positions.clamp(0, logits.shape[0] - 1), shift)


def without_invalid(pairs: Pairs, valid: Tensor | None, dtype: torch.dtype) -> Pairs:
    """The mask of rows as a bias, which rides on the product."""
    if valid is None:
        return pairs
    bias = _mask_bias(valid, dtype)
    return pairs._replace(bias=bias if pairs.bias is None else bias + pairs.bias)


def _mask_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero for a row that counts, -inf for one that doesn't."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(
        ~valid, -torch.inf
    )


def rows_gradient(
    queries: Float[Tensor, "queries dim"],
    rows: Float[Tensor, "rows dim"],
    gradient: Float[Tensor, " queries"],
    log_total: Float[Tensor, " queries"],
    *,
    scale: Float[Tensor, ""] | float,
    pairs: Pairs = ALL_PAIRS,
    tile: Tile | None = None,
    out: Float[Tensor, "rows dim"] | None = None,
) -> Float[Tensor, "rows dim"]:
    """sum_i gradient_i p_ij queries_i for each row j, from recomputed tiles; added to `out`.

    p_ij = exp(logit_ij - log_total_i), zero where the logit was above the ceiling.
    """
    num_queries, num_rows = tile or _default_tile(queries)
    pairs = pairs.in_base_two()
    # A sum of nothing has no probabilities: 2^(logit - largest number) is zero.
    log_total = log_total.masked_fill(log_total == -torch.inf, torch.finfo(rows.dtype).max / 2)
    result = torch.zeros_like(rows) if out is None else out
    for some in _slices(queries.shape[0], num_queries):
        scaled, weighted = queries[some] * (scale * LOG2_E), queries[some] * gradient[some, None]
        shift = log_total[some] * LOG2_E
        for part in _slices(rows.shape[0], num_rows):
            there = pairs.of_queries(some).of_rows(part)
            logits, above = tile_logits(scaled, rows[part], there)
            weights = logits.sub_(shift).exp2_()
            if above is not None:
                weights.masked_fill_(above, 0.0)
            result[part].addmm_(weights, weighted)
    return result
