"""The negatives of `prototype_logits` on a GPU: one Triton kernel, and cuBLAS or hipBLASLt.

Forward, the kernel multiplies a tile of queries with the rows, takes exponentials in registers and
adds them up: 2 B K D operations. Where a gradient is asked for, logits are bounded and there is
room, it also writes the exponentials in bfloat16, whose exponents reach as far as float32's: two
stock products then make both gradients, 4 B K D operations, and nothing is computed twice.

Elsewhere no logit leaves the chip. The backward pass recomputes the tiles of a block of queries and
writes the probabilities, times the gradient, in half precision, for the same two products: 6 B K D
operations, and a scratch of [512 to 8192 queries, rows], whatever the batch.

A form that keeps the gradient of a query tile on the chip was compared by its compiled code. At
D = 512 that gradient is 128 KiB of accumulators: it spills, or takes each exponential twice, and
it adds to the rows' gradient under locks, in no fixed order. Here every order is fixed. The price
are 6 bytes of probabilities a logit and one of the rows' gradient. At D = 512 that is 2.1 ps of an
H100's memory time, beside 3.1 ps of its products at their peak, so the products decide.

Positives are excluded in the tile: a list sorted by tile, empty for most tiles, costs the others
one load. Cosines have bounded logits, so that sums are taken relative to a constant.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from trainer.kernels.autotune import KernelSizes, chosen, size_class
from trainer.kernels.launches import STORING, Launch, architecture_of, forward_launches
from trainer.kernels.tiled import LOG2_E, Pairs

SCRATCH_BYTES = 1 << 30
"""What a block's probabilities may take in the backward pass..."""
BLOCK_QUERIES = (512, 8192)
"""...with at least and at most so many queries: the rows' gradient, read and written for each
block, costs 8 * dim / queries bytes a logit, and must not dwarf the 6 of the probabilities."""
PROGRAMS = 1024
"""Enough programs for every chip, by splitting the rows where there are few queries."""
HIGHEST_EXPONENT = 88.0
"""Of e, in float32."""
HALF_RANGE = 2.0**14
"""Probabilities are stored in float16 times this: normal numbers down to 4e-9."""


class TilePairs(NamedTuple):
    """The excluded pairs, sorted by (query tile, row tile)."""

    offsets: Tensor
    """int32: where the pairs of each tile begin; one more than there are tiles."""
    queries: Tensor
    rows: Tensor


@triton.jit
def exponential_product(  # type: ignore[no-untyped-def]
    queries,
    rows,
    bias,
    offsets,
    pair_queries,
    pair_rows,
    shift,
    weight,
    sums,
    peaks,
    stored,
    num_queries,
    num_rows,
    dim,
    stored_stride,
    tiles_per_split,
    scale,
    ceiling,
    reference,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CEILING: tl.constexpr,
    ONLINE: tl.constexpr,
    STORE: tl.constexpr,
    KEEP: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries against a range of row tiles; logits are in base 2.

    STORE: writes weight_i 2^(logit_ij - shift_i). Otherwise: row sums of 2^(logit_ij - reference),
    or, ONLINE, relative to the largest logit met so far, which is written too. KEEP: writes the
    exponentials that it adds up, zero where the logit was above the ceiling.
    RESIDENT: queries are loaded once; DIM is then their width.
    """
    # One axis, since a second one ends at 65,535. Neighbours read the same rows.
    query_tiles = tl.cdiv(num_queries, QUERIES)
    query_tile = tl.program_id(0) % query_tiles
    split = tl.program_id(0) // query_tiles
    num_tiles = tl.cdiv(num_rows, ROWS)
    left = tl.make_tensor_descriptor(queries, [num_queries, dim], [dim, 1], [QUERIES, DIM])
    right = tl.make_tensor_descriptor(rows, [num_rows, dim], [dim, 1], [ROWS, DIM])
    if STORE or KEEP:
        output = tl.make_tensor_descriptor(
            stored, [num_queries, num_rows], [stored_stride, 1], [QUERIES, ROWS]
        )
    query = query_tile * QUERIES + tl.arange(0, QUERIES)
    inside = query < num_queries
    total = tl.zeros([QUERIES], dtype=tl.float32)
    peak = tl.full([QUERIES], -float("inf"), dtype=tl.float32)
    if STORE:
        query_shift = tl.load(shift + query, mask=inside, other=0.0)
        query_weight = tl.load(weight + query, mask=inside, other=0.0)

    if RESIDENT:
        my_queries = left.load([query_tile * QUERIES, 0])
    first_tile = split * tiles_per_split
    for row_tile in range(first_tile, min(first_tile + tiles_per_split, num_tiles)):
        if RESIDENT:
            all_rows = right.load([row_tile * ROWS, 0])
            products = tl.dot(my_queries, all_rows.T, input_precision=PRECISION)
        else:
            products = tl.zeros([QUERIES, ROWS], dtype=tl.float32)
            for start in range(0, dim, DIM):
                some_queries = left.load([query_tile * QUERIES, start])
                some_rows = right.load([row_tile * ROWS, start])
                products = tl.dot(some_queries, some_rows.T, products, input_precision=PRECISION)
        row = row_tile * ROWS + tl.arange(0, ROWS)
        logits = products * scale
        if HAS_CEILING:
            # Such a logit adds to the sum, as a zero, and has no gradient.
            above = logits > ceiling
            logits = tl.where(above, -float("inf") if STORE else 0.0, logits)
        if HAS_BIAS:
            logits += tl.load(bias + row, mask=row < num_rows, other=-float("inf"))[None, :]
        else:
            logits = tl.where((row < num_rows)[None, :], logits, -float("inf"))
        tile = query_tile * num_tiles + row_tile
        first_pair, behind = tl.load(offsets + tile), tl.load(offsets + tile + 1)
        # The compiler loads row tiles ahead in loops that have no loop directly inside.
        if first_pair < behind:
            for pair in range(first_pair, behind):
                hit = (query == tl.load(pair_queries + pair))[:, None]
                hit = hit & (row == tl.load(pair_rows + pair))[None, :]
                logits = tl.where(hit, -float("inf"), logits)

        if STORE:
            values = tl.exp2(logits - query_shift[:, None]) * query_weight[:, None]
            place = [query_tile * QUERIES, row_tile * ROWS]
            output.store(place, values.to(stored.dtype.element_ty))
        elif ONLINE:
            higher = tl.maximum(peak, tl.max(logits, axis=1))
            # Finite: -inf - -inf is no number.
            base = tl.maximum(higher, -3.0e38)
            total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
            peak = higher
        else:
            exponentials = tl.exp2(logits - reference)
            total += tl.sum(exponentials, axis=1)
            if KEEP:
                if HAS_CEILING:
                    exponentials = tl.where(above, 0.0, exponentials)
                place = [query_tile * QUERIES, row_tile * ROWS]
                output.store(place, exponentials.to(stored.dtype.element_ty))
    if not STORE:
        tl.store(sums + split * num_queries + query, total, mask=inside)
        if ONLINE:
            tl.store(peaks + split * num_queries + query, peak, mask=inside)


def log_negatives(
    queries: Tensor,
    rows: Tensor,
    *,
    scale: float,
    pairs: Pairs,
    kept: Tensor | None = None,
    sizes: KernelSizes = "fixed",
) -> Tensor:
    """log sum_j exp(scale * queries . rows_j + bias_j), float32, of half-precision operands.

    With a fixed reference, exp(logit_ij - reference) is left in `kept`, zero above the ceiling.
    """
    if not queries.shape[0] or not rows.shape[0]:
        return queries.new_full((queries.shape[0],), -torch.inf, dtype=torch.float32)
    launch = chosen(
        forward_launches(
            architecture_of(queries.device), queries.shape[1], keeping=kept is not None
        ),
        lambda one: _log_negatives(queries, rows, scale, pairs, kept, one),
        sizes=sizes,
        problem=_problem("summing" if kept is None else "keeping", queries, rows, pairs),
        device=queries.device,
    )
    return _log_negatives(queries, rows, scale, pairs, kept, launch)


def _log_negatives(
    queries: Tensor, rows: Tensor, scale: float, pairs: Pairs, kept: Tensor | None, launch: Launch
) -> Tensor:
    count, num_tiles = queries.shape[0], triton.cdiv(rows.shape[0], launch.rows)
    query_tiles = triton.cdiv(count, launch.queries)
    splits = min(num_tiles, max(1, PROGRAMS // query_tiles))
    tiles_per_split = triton.cdiv(num_tiles, splits)
    splits = triton.cdiv(num_tiles, tiles_per_split)
    sums = queries.new_empty((splits, count), dtype=torch.float32)
    peaks = torch.empty_like(sums) if pairs.reference is None else sums
    _launch(
        query_tiles * splits,
        *(queries, rows, pairs, scale, launch),
        sums=sums,
        peaks=peaks,
        kept=kept,
        tiles_per_split=tiles_per_split,
    )
    if pairs.reference is not None:
        return sums.sum(dim=0).log() + pairs.reference
    return torch.logsumexp(peaks / LOG2_E + sums.log(), dim=0)


def room_to_keep(queries: Tensor, rows: Tensor, *, most_bytes: float) -> Tensor | None:
    """Where `log_negatives` may leave its exponentials; None if they take more than is allowed."""
    dtype = torch.float32 if queries.dtype == torch.float32 else torch.bfloat16
    stride = -(-rows.shape[0] // 16) * 16
    if not queries.shape[0] or not 0 < queries.shape[0] * stride * dtype.itemsize <= most_bytes:
        return None
    room = torch.empty((queries.shape[0], stride), dtype=dtype, device=queries.device)
    return room[:, : rows.shape[0]]


def write_kept_gradients(
    queries: Tensor,
    rows: Tensor,
    gradient: Tensor,
    log_total: Tensor,
    kept: Tensor,
    *,
    reference: float,
    of_queries: Tensor | None,
    of_rows: Tensor | None,
) -> None:
    """As `write_gradients`, of what the forward pass kept: two products, in its precision."""
    # A sum of nothing has no probabilities; the bound keeps a float32 from overflowing.
    share = (reference - log_total.float()).clamp_max(HIGHEST_EXPONENT).exp()
    weight = torch.where(log_total == -torch.inf, 0.0, gradient.float() * share)[:, None]
    if of_queries is not None:
        torch.mul(_product(kept, rows.to(kept.dtype)), weight, out=of_queries)
    if of_rows is not None:
        _write_product(of_rows, kept.T, (queries * weight).to(kept.dtype))


def write_gradients(
    queries: Tensor,
    rows: Tensor,
    gradient: Tensor,
    log_total: Tensor,
    *,
    dim: int,
    scale: float,
    pairs: Pairs,
    of_queries: Tensor | None,
    of_rows: Tensor | None,
    sizes: KernelSizes = "fixed",
) -> None:
    """Writes sum_j w_ij rows_j and sum_i w_ij queries_i, w_ij = gradient_i p_ij, to the float32
    tensors given, which hold zeros. Half-precision products, one block of queries at a time.
    Operands may have more than `dim` columns, of zeros."""
    if not queries.shape[0] or not rows.shape[0]:
        return
    # float16 holds a probability times its query's share of the largest gradient.
    largest = gradient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    unit = largest / HALF_RANGE if queries.dtype == torch.float16 else torch.ones_like(largest)
    stride = -(-rows.shape[0] // 16) * 16
    count = min(block_queries(stride * queries.element_size()), queries.shape[0])
    scratch = queries.new_empty((count, stride))
    # A sum of nothing has no probabilities: 2^(logit - a large number) is zero.
    shift = torch.where(log_total == -torch.inf, 3e38, log_total * LOG2_E).float()

    def store(some: slice, launch: Launch) -> Tensor:
        weights = scratch[: len(queries[some]), : rows.shape[0]]
        _launch(
            triton.cdiv(len(weights), launch.queries) * triton.cdiv(len(rows), launch.rows),
            *(queries[some], rows, pairs.of_queries(some), scale, launch),
            shift=shift[some],
            weight=(gradient[some] / unit).float(),
            stored=weights,
            tiles_per_split=1,
        )
        return weights

    launch = chosen(
        STORING[architecture_of(queries.device)],
        lambda one: store(slice(0, count), one),
        sizes=sizes,
        problem=_problem("storing", queries[:count], rows, pairs),
        device=queries.device,
    )
    for first in range(0, queries.shape[0], count):
        some = slice(first, min(first + count, queries.shape[0]))
        weights = store(some, launch)
        if of_queries is not None:
            torch.mul(_product(weights, rows[:, :dim]), unit, out=of_queries[some])
        if of_rows is not None:
            _add_product(of_rows, weights.T, queries[some, :dim])
    if of_rows is not None:
        of_rows.mul_(unit)


def _problem(work: str, queries: Tensor, rows: Tensor, pairs: Pairs) -> Hashable:
    """What decides which sizes are fastest."""
    ways = (pairs.bias is None, pairs.ceiling is None, pairs.reference is None)
    shape = size_class(queries.shape[0], *rows.shape)
    return work, architecture_of(queries.device), queries.dtype, shape, ways


def block_queries(bytes_per_query: int) -> int:
    """Queries whose probabilities exist at once in the backward pass."""
    fewest, most = BLOCK_QUERIES
    return max(fewest, min(most, SCRATCH_BYTES // bytes_per_query // 128 * 128))


def sorted_pairs(excluded: Tensor, *, num_rows: int, launch: Launch) -> TilePairs:
    """The pairs of [queries, width] positions by tile, without waiting for the device: positions
    that are no row stand behind the last tile."""
    query_tiles = triton.cdiv(excluded.shape[0], launch.queries)
    row_tiles = triton.cdiv(num_rows, launch.rows)
    query = torch.arange(excluded.shape[0], device=excluded.device)[:, None].expand_as(excluded)
    inside = (excluded >= 0) & (excluded < num_rows)
    tile = query // launch.queries * row_tiles + excluded // launch.rows
    num_tiles = query_tiles * row_tiles
    tile, order = torch.where(inside, tile, num_tiles).to(torch.int32).flatten().sort()
    places = torch.arange(num_tiles + 1, dtype=torch.int32, device=excluded.device)
    offsets = torch.searchsorted(tile, places, out_int32=True)
    listed = [pairs.flatten()[order].to(torch.int32) for pairs in (query, excluded)]
    return TilePairs(offsets, *listed)


def operands(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Contiguous, in the products' precision, rows of whole 16 bytes as descriptors need them."""
    width = 16 // dtype.itemsize
    return [pad(tensor.to(dtype), (0, -tensor.shape[1] % width)).contiguous() for tensor in tensors]


def _launch(
    num_programs: int,
    queries: Tensor,
    rows: Tensor,
    pairs: Pairs,
    scale: float,
    launch: Launch,
    *,
    tiles_per_split: int,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    sums: Tensor | None = None,
    peaks: Tensor | None = None,
    stored: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    excluded = pairs.excluded
    if excluded is None:
        excluded = torch.empty(queries.shape[0], 0, dtype=torch.int64, device=queries.device)
    tiles = sorted_pairs(excluded, num_rows=rows.shape[0], launch=launch)
    bias = None if pairs.bias is None else pairs.bias.float() * LOG2_E
    any_tensor: Any = tiles.offsets
    output = stored if kept is None else kept
    allow_descriptors(queries.device)
    exponential_product[(num_programs,)](
        *(queries, rows, any_tensor if bias is None else bias),
        *(tiles.offsets, tiles.queries, tiles.rows),
        *(tensor if tensor is not None else any_tensor for tensor in (shift, weight, sums, peaks)),
        any_tensor if output is None else output,
        *(queries.shape[0], rows.shape[0], queries.shape[1]),
        16 if output is None else output.stride(0),
        tiles_per_split,
        scale * LOG2_E,
        0.0 if pairs.ceiling is None else pairs.ceiling * LOG2_E,
        0.0 if pairs.reference is None else pairs.reference * LOG2_E,
        QUERIES=launch.queries,
        ROWS=launch.rows,
        DIM=launch.dim,
        HAS_BIAS=bias is not None,
        HAS_CEILING=pairs.ceiling is not None,
        ONLINE=pairs.reference is None,
        STORE=stored is not None,
        KEEP=kept is not None,
        RESIDENT=launch.resident,
        PRECISION="ieee",
        num_warps=launch.warps,
        num_stages=launch.stages,
    )


def allow_descriptors(device: torch.device) -> None:
    """Descriptors live in memory that Triton asks for."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32, of operands that may be halves."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.device.type == "cpu":
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _write_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """To a tensor of zeros."""
    if left.device.type == "cpu":
        torch.mm(left.float(), right.float(), out=result)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=result)
