"""Scores of points with very many centroids on a GPU: x.c - |c|^2 / 2, as maxima of groups.

An exact label needs more than an argmax: every column whose score is within the rounding margin of
the row's best, and the best is known only at the end. So the kernel carries neither an index nor a
running best. It keeps the largest score of each group of 32 columns: 4 bytes written for 32 * 2 D
operations, at D = 768 a hundredth of the products' time at an H100's peak. The maximum over the
groups is the best; the few groups that reach the margin are scored once more, by `group_scores`,
and that gives the columns. Nothing overflows, nothing is atomic, and splitting the columns over
programs needs no second step.

Points stay on the chip while all centroids pass, where their numbers fit (D up to 256 in halves);
above, tiles of both are read again, from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.kernels.launches import Launch, architecture_of
from trainer.kernels.triton_logits import allow_descriptors

GROUP = 32
"""Columns of which the largest score is kept. The number of columns is a multiple."""
PROGRAMS = 1024
"""Enough programs for every chip, by splitting the columns where there are few points."""
RESIDENT_BYTES = 512
"""Of a point that stays on the chip."""

STREAMED = {
    "sm80": Launch(),
    "sm90": Launch(),
    "sm100": Launch(),
    "gfx942": Launch(dim=32, stages=2),
}
"""Launches by architecture, for points in halves that are read again for every tile..."""
RESIDENT = {
    "sm80": Launch(dim=256, stages=2),
    "sm90": Launch(dim=256, stages=2),
    "sm100": Launch(dim=256, stages=2),
    "gfx942": Launch(rows=64, dim=256, stages=2),
}
"""...and for points that stay; `dim` is at most that."""
PAIR_DIM = 128


@triton.jit
def maxima_of_groups(  # type: ignore[no-untyped-def]
    points,
    centroids,
    offsets,
    maxima,
    num_points,
    num_columns,
    dim,
    num_groups,
    tiles_per_split,
    POINTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """One tile of points against a range of column tiles."""
    point_tile = tl.program_id(0)
    split = tl.program_id(1)
    left = tl.make_tensor_descriptor(points, [num_points, dim], [dim, 1], [POINTS, DIM])
    right = tl.make_tensor_descriptor(centroids, [num_columns, dim], [dim, 1], [COLUMNS, DIM])
    point = point_tile * POINTS + tl.arange(0, POINTS)
    places = maxima + point.to(tl.int64)[:, None] * num_groups
    if RESIDENT:
        held = left.load([point_tile * POINTS, 0])
    first_tile = split * tiles_per_split
    num_tiles = tl.cdiv(num_columns, COLUMNS)
    for tile in range(first_tile, min(first_tile + tiles_per_split, num_tiles)):
        products = tl.zeros([POINTS, COLUMNS], dtype=tl.float32)
        if RESIDENT:
            some_columns = right.load([tile * COLUMNS, 0])
            products = tl.dot(held, some_columns.T, products, input_precision="tf32")
        else:
            for start in range(0, dim, DIM):
                some_points = left.load([point_tile * POINTS, start])
                some_columns = right.load([tile * COLUMNS, start])
                products = tl.dot(some_points, some_columns.T, products, input_precision="tf32")
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        scores = products + tl.load(offsets + column, mask=column < num_columns, other=0.0)[None, :]
        tops = tl.max(tl.reshape(scores, [POINTS, COLUMNS // GROUP, GROUP]), axis=2)
        group = tile * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
        inside = (point < num_points)[:, None] & (group < num_groups)[None, :]
        tl.store(places + group[None, :], tops, mask=inside)


@triton.jit
def scores_of_groups(  # type: ignore[no-untyped-def]
    points,
    centroids,
    offsets,
    rows,
    groups,
    scores,
    dim,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
):
    """The scores of one point with the columns of one group."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.load(groups + pair) * GROUP + tl.arange(0, GROUP)
    point = points + tl.load(rows + pair) * dim
    total = tl.zeros([GROUP], dtype=tl.float32)
    for start in range(0, dim, DIM):
        place = start + tl.arange(0, DIM)
        inside = place < dim
        own = tl.load(point + place, mask=inside, other=0.0).to(tl.float32)
        others = tl.load(
            centroids + column[:, None] * dim + place[None, :], mask=inside[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(others * own[None, :], axis=1)
    tl.store(scores + pair * GROUP + tl.arange(0, GROUP), total + tl.load(offsets + column))


def group_maxima(
    points: Float[Tensor, "n width"],
    centroids: Float[Tensor, "columns width"],
    offsets: Float[Tensor, " columns"],
) -> Float[Tensor, "n groups"]:
    """max over each group of x.c + offset, float32, of half-precision or float32 operands.

    Contiguous rows of whole 16 bytes. Products are summed in float32; float32 operands are cut to
    TF32 whatever torch's setting is, since the scan's precision changes no label (and exact float32
    products of such tiles spill). A score that is not a number may be lost.
    """
    launch = launch_for(points, architecture_of(points.device))
    num_groups = centroids.shape[0] // GROUP
    maxima = points.new_empty((points.shape[0], num_groups), dtype=torch.float32)
    if not points.shape[0]:
        return maxima
    point_tiles = triton.cdiv(points.shape[0], launch.queries)
    num_tiles = triton.cdiv(centroids.shape[0], launch.rows)
    tiles_per_split = triton.cdiv(num_tiles, min(num_tiles, max(1, PROGRAMS // point_tiles)))
    allow_descriptors(points.device)
    maxima_of_groups[(point_tiles, triton.cdiv(num_tiles, tiles_per_split))](
        *(points, centroids, offsets, maxima),
        *(points.shape[0], centroids.shape[0], points.shape[1], num_groups, tiles_per_split),
        POINTS=launch.queries,
        COLUMNS=launch.rows,
        DIM=launch.dim,
        GROUP=GROUP,
        RESIDENT=points.shape[1] <= launch.dim,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return maxima


def launch_for(points: Float[Tensor, "n width"], architecture: str) -> Launch:
    """Points that are short enough stay on the chip; float32 takes tiles of half the width."""
    width = points.shape[1]
    if width * points.dtype.itemsize <= RESIDENT_BYTES:
        launch = RESIDENT[architecture]
        return launch._replace(dim=max(triton.next_power_of_2(width), 16))
    launch = STREAMED[architecture]
    return launch._replace(dim=launch.dim * 2 // points.dtype.itemsize)


def group_scores(
    points: Float[Tensor, "n width"],
    centroids: Float[Tensor, "columns width"],
    offsets: Float[Tensor, " columns"],
    rows: Int64[Tensor, " p"],
    groups: Int64[Tensor, " p"],
) -> Float[Tensor, "p members"]:
    """x.c + offset of each point `rows` with the columns of its group, float32."""
    scores = points.new_empty((rows.shape[0], GROUP), dtype=torch.float32)
    if rows.shape[0]:
        scores_of_groups[(rows.shape[0],)](
            *(points, centroids, offsets, rows, groups, scores, points.shape[1]),
            GROUP=GROUP,
            DIM=PAIR_DIM,
            num_warps=4,
        )
    return scores
