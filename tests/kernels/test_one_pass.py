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


@pytest.mark.parametrize("rows", [1000, 196_608, 1_000_000])
def test_the_buffer_is_bounded_where_one_pass_is_chosen(rows: int) -> None:
    """However small the batch: 64 queries against a million rows would be 256 MB."""
    buffer = queries_per_block(rows, 4) * rows * 4
    assert fits_one_pass(rows, 4) == (buffer <= BUFFER_BYTES)
