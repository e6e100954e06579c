"""The streamed log-partition and its gradients against whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.memory import largest_intermediate
from tests.kernels.test_tiled import SIZES, inputs
from trainer.kernels.log_partition import log_partition
from trainer.kernels.way import Way


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 99))
def test_gradients_equal_those_of_the_dense_form(
    queries: int, rows: int, tile_rows: int, seed: int
) -> None:
    """Rows with no valid key have no gradient; their value is -inf."""
    left, right, valid = inputs(queries, rows, 4, seed=seed)
    valid[:1] = True
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    leaves = (left.requires_grad_(), scale, right.requires_grad_())
    weights = torch.randn(queries, dtype=torch.float64)
    ours = log_partition(left, scale, right, valid=valid, way=Way(tile=(7, tile_rows)))
    dense = (scale * left @ right.T)[:, valid].logsumexp(dim=1)
    for one, other in zip(
        torch.autograd.grad((ours * weights).nan_to_num().sum(), leaves),
        torch.autograd.grad((dense * weights).nan_to_num().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other if rows else torch.zeros_like(one))


@pytest.mark.heavy
def test_gradients_pass_a_finite_difference_check() -> None:
    left, right, valid = inputs(4, 11, 3, seed=1)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    leaves = (left.requires_grad_(), scale, right.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda *values: log_partition(*values, valid=valid, way=Way(tile=(3, 4))), leaves
    )


def test_a_second_derivative_is_refused() -> None:
    left, right, _ = inputs(4, 5, 3, seed=2)
    scale = torch.tensor(3.0, dtype=torch.float64)
    total = log_partition(left.requires_grad_(), scale, right).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, left, create_graph=True)


def test_no_tensor_of_queries_by_rows_exists_forward_or_backward() -> None:
    left, right, valid = inputs(64, 300, 2, seed=5)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    left.requires_grad_()
    right.requires_grad_()

    def both_passes() -> None:
        log_partition(left, scale, right, valid=valid, way=Way(tile=(16, 50))).sum().backward()

    assert largest_intermediate(both_passes) == max(16 * 50, 300 * 2)
