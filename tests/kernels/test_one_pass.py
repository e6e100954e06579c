"""Gradients made in the forward pass against those of whole matrices, and what they cost."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from tests.kernels.memory import peak_bytes
from tests.kernels.naive import naive_logits, pulled_back, ragged_problem
from trainer.kernels import one_pass
from trainer.kernels.one_pass import (
    BUFFER_BYTES,
    fits_one_pass,
    gradients_in_one_pass,
    queries_per_block,
)
from trainer.kernels.prototype_logits import prototype_logits

SMALL = st.integers(0, 25)


@settings(max_examples=100, deadline=None)
@given(
    SMALL,
    SMALL,
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from([None, 0.1]),
    st.sampled_from([10.0, 64.0, 75.0]),
    st.integers(0, 99),
)
def test_gradients_equal_the_dense_form(
    queries: int,
    rows: int,
    extra: int,
    labels: int,
    ceiling: float | None,
    scale: float,
    seed: int,
) -> None:
    problem = ragged_problem(queries, rows, 4, labels, seed=seed, extra=extra)
    leaves = problem.queries.requires_grad_(), problem.rows.requires_grad_()
    dense = naive_logits(problem, scale=scale, ceiling=ceiling)

    def upstream(some: slice, log_total: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
        torch.testing.assert_close((log_total, cosines), tuple(part[some] for part in dense))
        nothing = log_total == -torch.inf
        return problem.upstream[0][some].masked_fill(nothing, 0.0), problem.upstream[1][some]

    with patch.multiple(one_pass, ROWS_PER_TILE=6), torch.no_grad():
        ours = gradients_in_one_pass(
            *(problem.queries, problem.rows, problem.positives, upstream),
            scale=scale,
            num_negatives=rows,
            bias=problem.bias,
            ceiling=ceiling,
            block_queries=7,
        )
    torch.testing.assert_close(ours, pulled_back(dense, problem, leaves))


@pytest.mark.heavy
def test_both_forms_take_a_fifteenth_of_the_memory_of_all_logits() -> None:
    """Over the inputs and the rows' gradient, which every form has."""
    with FakeTensorMode():
        queries, rows = torch.empty(1024, 256), torch.empty(100_000, 256)
        labels = torch.empty(1024, 1, dtype=torch.int64)
        leaves = queries.requires_grad_(), rows.requires_grad_()

        def naive() -> None:
            cross_entropy(64 * queries @ rows.T, labels[:, 0]).backward()

        def two_passes() -> None:
            total, cosines = prototype_logits(queries, rows, labels, scale=64.0)
            torch.logaddexp(total - 64 * cosines[:, 0], total * 0).mean().backward()

        def once() -> None:
            gradients_in_one_pass(
                *(queries.detach(), rows.detach(), labels, lambda some, *parts: parts),
                scale=64.0,
                num_negatives=len(rows),
            )

        extra = []
        for computation in (naive, two_passes, once):
            for leaf in leaves:
                leaf.grad = None
            peak = peak_bytes(computation, *leaves, labels)
            extra.append(peak - rows.numel() * rows.element_size())
    assert extra[0] > 2 * 1024 * 100_000 * 4
    assert max(extra[1:]) <= extra[0] / 15, extra


@pytest.mark.parametrize("rows", [1000, 262_144, 1_000_000])
@pytest.mark.parametrize("dim", [64, 256])
def test_the_buffer_is_bounded_where_one_pass_is_chosen(rows: int, dim: int) -> None:
    """However small the batch: 64 queries against a million rows are 256 MB, a quarter of rows of
    256 numbers."""
    buffer = queries_per_block(rows, 4) * rows * 4
    assert fits_one_pass(rows, dim, 4) == (buffer <= BUFFER_BYTES or buffer * 4 <= rows * dim * 4)


def test_blocks_are_multiples_of_a_vector() -> None:
    assert [queries_per_block(rows, 4) for rows in (100_000, 20_000, 10_000_000)] == [160, 832, 64]


def test_small_terms_are_not_lost_in_large_sums() -> None:
    """One exponential of e^17, then a hundred thousand of one: added one by one each would vanish
    in float32, in the sum and in the weighted sum of the rows' second coordinate."""
    rows = torch.tensor([0.0, 1.0]).repeat(100_000, 1)
    rows[0] = 0.5**0.5
    totals: list[Tensor] = []

    def upstream(_: slice, log_total: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
        totals.append(log_total)
        return torch.ones_like(log_total), torch.zeros_like(cosines)

    problem = torch.tensor([[1.0, 0.0]]), rows, torch.tensor([[-1]])
    scale = 17 * 2**0.5
    of_queries, _ = gradients_in_one_pass(
        *problem, upstream, scale=scale, num_negatives=len(rows), block_queries=1
    )
    weights = (scale * rows[:, 0].double()).exp()
    torch.testing.assert_close(totals[0].double(), weights.sum().log()[None], rtol=1e-7, atol=0)
    # A tile's product is one sum of two thousand terms, and may lose those: 1e-4 of this one.
    expected = scale * (weights @ rows.double() / weights.sum())
    torch.testing.assert_close(of_queries[0].double(), expected, rtol=2e-4, atol=0)
