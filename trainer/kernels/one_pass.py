"""Both gradients of a loss over prototypes in the pass that computes it: three products, not four.

`prototype_logits` recomputes its tiles in the backward pass, because only then it knows what a
query's sum is worth. Where every sample's loss depends on its own sums alone, and the objective is
a mean, that is known as soon as the sample has met all rows. Its exponentials are then still there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.kernels.prototype_logits import add_pair_gradients, pair_products
from trainer.kernels.tiled import LOG2_E, Pairs, fixed_reference, tile_logits
from trainer.kernels.way import Way

BUFFER_BYTES = 64 << 20
"""Exponentials of a block of queries against all rows: 160 queries with 100,000 rows. Every block
reads the rows and adds to their gradient, so that larger ones are a little faster."""
FEWEST_QUERIES = 64
"""With fewer in a block, the products run at a part of their speed..."""
WHOLE_QUERIES = 32
"""...as they do where a block is no multiple of the processor's vectors."""
ROWS_PER_TILE = 2048
LARGEST_SCALE = 80.0
"""Of cosines: above, float32 has no fixed reference."""

Upstream = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]]
"""For a block of queries, their `log sum_j exp(logit_j)` and cosines with the positives: the
gradients of the objective in these."""


def gradients_in_one_pass(
    queries: Float[Tensor, "queries dim"],
    rows: Float[Tensor, "rows dim"],
    positives: Int64[Tensor, "queries labels"],
    upstream: Upstream,
    *,
    scale: float,
    num_negatives: int,
    bias: Float[Tensor, " negatives"] | None = None,
    ceiling: float | None = None,
    block_queries: int | None = None,
) -> tuple[Float[Tensor, "queries dim"], Float[Tensor, "rows dim"]]:
    """The objective's gradients in queries and rows; arguments as in `prototype_logits`.

    For scales that have a fixed reference. Cost: 6 * queries * rows * dim FLOPs and one exponential
    a logit; a buffer of `BUFFER_BYTES`, or of 64 queries by rows where that is more.
    """
    reference = fixed_reference(scale)
    assert reference is not None, f"scale {scale} needs a running maximum"
    negatives = rows[:num_negatives]
    pairs = Pairs(bias, positives, None if ceiling is None else scale * ceiling, reference)
    pairs = pairs.in_base_two()
    of_queries, of_rows = torch.zeros_like(queries), torch.empty_like(rows)
    of_rows[num_negatives if len(queries) else 0 :] = 0.0
    of_cosines = torch.zeros(positives.shape, dtype=queries.dtype, device=queries.device)
    size = min(block_queries or queries_per_block(num_negatives, rows.element_size()), len(queries))
    buffer = queries.new_empty(size * num_negatives)
    for first in range(0, len(queries), max(1, size)):
        some = slice(first, min(first + size, len(queries)))
        count = some.stop - first
        block = buffer[: num_negatives * count].view(num_negatives, count)
        scaled, weighted = queries[some] * (scale * LOG2_E), of_queries[some]
        mass = _sums(scaled, negatives, pairs.of_queries(some), block, weighted)
        cosines = pair_products(queries[some], rows, positives[some])
        of_log, of_cosines[some] = upstream(some, mass.log() + reference, cosines)
        weight = torch.where(mass > 0, scale * of_log / mass, 0.0)[:, None]
        weighted.mul_(weight)
        # The first block finds what the memory held before.
        _add_rows(of_rows[:num_negatives], block, queries[some] * weight, keep=first > 0)
    add_pair_gradients(queries, rows, positives, of_cosines, of_queries=of_queries, of_rows=of_rows)
    return of_queries, of_rows


def queries_per_block(num_rows: int, element_size: int) -> int:
    most = BUFFER_BYTES // max(1, num_rows * element_size)
    return max(FEWEST_QUERIES, most - most % WHOLE_QUERIES)


def fits_one_pass(num_rows: int, dim: int, element_size: int) -> bool:
    """Whether a block of queries that is worth multiplying takes at most `BUFFER_BYTES`, or a
    quarter of the rows' own bytes. If not, the two passes of `prototype_logits` are the better
    bargain: a third more products, and memory of one tile."""
    buffer = FEWEST_QUERIES * num_rows * element_size
    return buffer <= max(BUFFER_BYTES, num_rows * dim * element_size // 4)


def serves_one_pass(
    num_rows: int, dim: int, *, scale: float, way: Way, device: torch.device
) -> bool:
    """Whether float32 rows, so many, at this scale, are for this form rather than for tiles."""
    fits = scale <= LARGEST_SCALE and fits_one_pass(num_rows, dim, 4)
    return fits and device.type == "cpu" and leaves_one_pass(way, device)


def leaves_one_pass(way: Way, device: torch.device) -> bool:
    """Whether a way lets plain torch compute, and in pieces of its own choice."""
    return way.operands(device) is None and way.tile is None


def _tiles(count: int) -> list[slice]:
    return [slice(first, first + ROWS_PER_TILE) for first in range(0, count, ROWS_PER_TILE)]


def _sums(scaled: Tensor, rows: Tensor, pairs: Pairs, buffer: Tensor, weighted: Tensor) -> Tensor:
    """sum_j e_ij; adds sum_j e_ij rows_j to `weighted`. Leaves e_ij = exp(logit_ij - reference) in
    the buffer, [rows, queries], where it is zero for logits above the ceiling, which count in the
    first sum only."""
    mass = scaled.new_zeros(scaled.shape[0])
    for part in _tiles(rows.shape[0]):
        logits, above = tile_logits(scaled, rows[part], pairs.of_rows(part), out=buffer[part])
        if pairs.reference:
            logits.sub_(pairs.reference)
        exponentials = logits.exp2_()
        mass += exponentials.sum(dim=0)
        if above is not None:
            exponentials.masked_fill_(above, 0.0)
        # Not accumulated inside of the product, where a small number would vanish in a large sum.
        weighted.add_(exponentials.T @ rows[part])
    return mass


def _add_rows(of_rows: Tensor, exponentials: Tensor, queries: Tensor, *, keep: bool) -> None:
    for part in _tiles(of_rows.shape[0]):
        of_rows[part].addmm_(exponentials[part], queries, beta=float(keep))
