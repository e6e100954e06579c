"""The primitive in plain torch against whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.memory import largest_intermediate, saved_elements
from tests.kernels.naive import naive_logits, pulled_back, ragged_problem
from trainer.kernels.prototype_logits import prototype_logits
from trainer.kernels.tiled import Pairs, partition_sums
from trainer.kernels.way import Way

SMALL = st.integers(0, 25)


@settings(max_examples=120, deadline=None)
@given(
    SMALL,
    SMALL,
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from([None, 0.1]),
    st.sampled_from([10.0, 64.0, 90.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_values_and_gradients_equal_the_dense_form(
    queries: int,
    rows: int,
    extra: int,
    labels: int,
    ceiling: float | None,
    scale: float,
    biased: bool,
    seed: int,
) -> None:
    """Absent and repeated positives, rows that are no negatives, weights, the ceiling, no rows."""
    problem = ragged_problem(queries, rows, 4, labels, seed=seed, extra=extra)
    problem = problem if biased else problem._replace(bias=None)
    leaves = problem.queries.requires_grad_(), problem.rows.requires_grad_()
    ours = prototype_logits(
        *(*leaves, problem.positives),
        scale=scale,
        num_negatives=rows,
        bias=problem.bias,
        ceiling=ceiling,
        way=Way(tile=(4, 6)),
    )
    dense = naive_logits(problem, scale=scale, ceiling=ceiling)
    torch.testing.assert_close(ours, dense)
    gradients = pulled_back(ours, problem, leaves), pulled_back(dense, problem, leaves)
    torch.testing.assert_close(*gradients)


@pytest.mark.heavy
def test_gradients_pass_a_finite_difference_check() -> None:
    problem = ragged_problem(5, 9, 3, 2, seed=8, extra=2)
    leaves = problem.queries.requires_grad_(), problem.rows.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *both: prototype_logits(
            *(*both, problem.positives),
            scale=4.0,
            num_negatives=9,
            bias=problem.bias,
            way=Way(tile=(2, 4)),
        ),
        leaves,
    )


def test_a_second_derivative_is_refused() -> None:
    problem = ragged_problem(3, 4, 3, 1)
    queries = problem.queries.requires_grad_()
    total, _ = prototype_logits(queries, problem.rows, problem.positives, scale=3.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total.sum(), queries, create_graph=True)


def test_nothing_larger_than_a_tile_exists_and_nothing_but_inputs_and_results_is_kept() -> None:
    problem = ragged_problem(64, 500, 2, 3)
    queries, rows = problem.queries.requires_grad_(), problem.rows.requires_grad_()

    def forward() -> torch.Tensor:
        total, cosines = prototype_logits(
            *(queries, rows, problem.positives), scale=9.0, way=Way(tile=(16, 50))
        )
        return total.sum() + cosines.sum()

    assert largest_intermediate(lambda: forward().backward()) == 500 * 2
    # Queries, rows, positives, the mean row of each query, the logarithms.
    assert saved_elements(forward) <= 64 * 2 + 500 * 2 + 64 * 3 + 64 * 2 + 64


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_ten_million_equal_cosines_are_finite_in_float32(cosine: float) -> None:
    """Their number as a bias: no table of that size is needed."""
    queries = torch.tensor([[1.0, 0.0]])
    rows = torch.tensor([[cosine, 0.0]])
    bias = torch.tensor([1e7]).log()
    for scale in (64.0, 80.0, 100.0):
        total, _ = prototype_logits(queries, rows, torch.tensor([[-1]]), scale=scale, bias=bias)
        expected = scale * cosine + bias.double()
        if scale == 80.0 and cosine < 0:
            assert total.item() == -torch.inf or abs(total.item() - expected.item()) < 1e-3
        else:
            torch.testing.assert_close(total.double(), expected, rtol=2e-6, atol=0)


def test_fixed_reference_and_running_maximum_agree() -> None:
    problem = ragged_problem(20, 300, 8, 2, seed=3)
    sums = [
        partition_sums(
            *(problem.queries.float(), problem.rows.float(), problem.rows.float()),
            scale=64.0,
            pairs=Pairs(excluded=problem.positives, reference=reference),
            tile=(7, 64),
        )
        for reference in (0.0, None)
    ]
    torch.testing.assert_close(sums[0].log_partition, sums[1].log_partition, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums[0].mean, sums[1].mean, rtol=1e-4, atol=1e-6)
