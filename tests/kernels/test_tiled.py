"""The streamed softmax statistics against whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.losses.dense import random_rows
from trainer.kernels.tiled import merge, partition_sums

SIZES = st.integers(0, 40)


def inputs(queries: int, rows: int, dim: int, *, seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    valid = torch.rand(rows, generator=draw) < 0.7
    return random_rows(queries, dim, draw), random_rows(rows, dim, draw), valid


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_sums_equal_the_dense_softmax(
    queries: int, rows: int, dim: int, tile_queries: int, tile_rows: int, seed: int
) -> None:
    left, right, valid = inputs(queries, rows, dim, seed=seed)
    values = torch.randn(rows, 3, dtype=torch.float64)
    sums = partition_sums(
        left, right, values, scale=30.0, valid=valid, tile=(tile_queries, tile_rows)
    )
    logits = (30 * left @ right.T).masked_fill(~valid, -torch.inf)
    torch.testing.assert_close(sums.log_partition, logits.logsumexp(dim=1))
    expected = logits.softmax(dim=1).nan_to_num() @ values
    torch.testing.assert_close(sums.mean, expected)


def test_merging_any_partition_of_the_rows_equals_the_whole() -> None:
    left, right, valid = inputs(9, 30, 5, seed=3)
    whole = partition_sums(left, right, right, scale=100.0, valid=valid)
    for cuts in ([30], [0, 30], [1, 29], [7, 0, 0, 20, 3], [10, 10, 10], [1] * 30):
        parts = [
            partition_sums(left, keys, keys, scale=100.0, valid=counted)
            for keys, counted in zip(right.split(cuts), valid.split(cuts), strict=True)
        ]
        for order in (parts, parts[::-1]):
            total = order[0]
            for part in order[1:]:
                total = merge(total, part)
            torch.testing.assert_close(total.log_partition, whole.log_partition, rtol=1e-14, atol=0)
            torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-15)


def test_rows_that_are_not_valid_can_hold_anything() -> None:
    left, right, valid = inputs(4, 12, 3, seed=4)
    other = torch.where(valid[:, None], right, 1e3)
    expected = partition_sums(left, right, right, scale=9.0, valid=valid)
    found = partition_sums(left, other, other, scale=9.0, valid=valid)
    torch.testing.assert_close(found, expected)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_rows_at_scale_100_are_finite_whatever_the_tile(dtype) -> None:
    """Cosines of +1, -1 and between; a constant shift would overflow or vanish in float32."""
    angles = torch.linspace(0, torch.pi, 1_000_000, dtype=torch.float64)
    rows = torch.stack([angles.cos(), angles.sin()], dim=1).to(dtype)
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]], dtype=dtype)
    logits = 100 * queries.double() @ rows.double().T
    found = [partition_sums(queries, rows, rows, scale=100.0, tile=(2, n)) for n in (999, 4096)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for sums in found:
        torch.testing.assert_close(
            sums.log_partition.double(), logits.logsumexp(dim=1), rtol=tolerance, atol=tolerance
        )
    torch.testing.assert_close(found[0].mean, found[1].mean, rtol=tolerance, atol=tolerance)
