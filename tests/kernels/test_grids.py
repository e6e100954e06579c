"""The grids that the kernels ask for at sizes that no test holds in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.kernels.tiled import Pairs

triton_logits = pytest.importorskip("trainer.kernels.triton_logits")
triton_assign = pytest.importorskip("trainer.kernels.triton_assign")

LIMITS = (2**31 - 1, 65_535, 65_535)
"""Of the three axes of a CUDA grid."""
MILLION = 1_000_000
Grid = tuple[int, ...]


class Recorded:
    """In place of a kernel: notes each grid."""

    def __init__(self) -> None:
        self.grids: list[Grid] = []

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *arguments, **constants: None


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    kernel = Recorded()
    with (
        patch.object(triton_logits, "exponential_product", kernel),
        patch.object(triton_assign, "maxima_of_groups", kernel),
        patch.object(triton_assign, "scores_of_groups", kernel),
        patch.object(triton_logits, "_product", lambda left, right: left.new_empty(())),
        patch.object(triton_logits, "_add_product", lambda total, left, right: None),
        FakeTensorMode(),
    ):
        yield kernel


def halves(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float16)


def fits(grid: Grid) -> bool:
    return all(0 < size <= limit for size, limit in zip(grid, LIMITS, strict=False))


@pytest.mark.heavy
@pytest.mark.parametrize("num_rows", [1, 125_000, 8_388_481, 10 * MILLION, 16 * MILLION])
@pytest.mark.parametrize("num_queries", [1, 512, 32_768])
def test_grids_of_the_head_fit_up_to_16_million_rows(
    recorded: Recorded, num_rows: int, num_queries: int
) -> None:
    """Both passes; a second axis would end at 65,535 tiles of 128 rows, 8.4 million."""
    queries, rows = halves(num_queries, 64), halves(num_rows, 64)
    pairs = Pairs(reference=64.0)
    triton_logits.log_negatives(queries, rows, scale=64.0, pairs=pairs)
    each = torch.empty(num_queries)
    triton_logits.write_gradients(
        *(queries, rows, each, each),
        dim=64,
        scale=64.0,
        pairs=pairs,
        of_queries=None,
        of_rows=None,
    )
    forward, *backward = recorded.grids
    assert backward
    assert all(fits(grid) for grid in recorded.grids), recorded.grids
    assert sum(grid[0] for grid in backward) >= -(-num_rows // 128) * -(-num_queries // 128)
    assert forward[0] >= -(-num_queries // 128)


@pytest.mark.parametrize("num_columns", [32, MILLION, 16 * MILLION])
def test_grids_of_the_nearest_centroids_fit_up_to_16_million(
    recorded: Recorded, num_columns: int
) -> None:
    for num_points in (1, 65_536, 10 * MILLION):
        points, centroids = halves(num_points, 64), halves(num_columns, 64)
        offsets = torch.empty(num_columns)
        triton_assign.group_maxima(points, centroids, offsets)
        pairs = torch.empty(num_points, dtype=torch.int64)
        triton_assign.group_scores(points, centroids, offsets, pairs, pairs)
    assert len(recorded.grids) == 6
    assert all(fits(grid) for grid in recorded.grids), recorded.grids


def test_the_check_finds_a_second_axis_that_is_too_long() -> None:
    assert not fits((4, 78_125))
    assert fits((4 * 78_125,))
