"""The batch norm of the heads is that of the whole batch, however many ranks share it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.models.batch_norm import GlobalBatchNorm

WIDTH = 6
ROWS = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(1)) * 3 + 5
PULL = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(2))
SCALE, SHIFT = torch.linspace(0.5, 2.0, WIDTH), torch.linspace(-1.0, 1.0, WIDTH)


def shared_pass(comm: Comm, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Two training passes over this rank's rows; the pull makes the gradient of a sum."""
    norm = GlobalBatchNorm(WIDTH, comm)
    with torch.no_grad():
        norm.weight.copy_(SCALE)
        norm.bias.copy_(SHIFT)
    rows = ROWS.split(sizes)[comm.rank].clone().requires_grad_()
    with torch.no_grad():
        norm(rows)
    output = norm(rows)
    (output * PULL.split(sizes)[comm.rank]).sum().backward()
    norm.eval()
    values = {
        "output": output,
        "rows_grad": rows.grad,
        "weight_grad": norm.weight.grad,
        "bias_grad": norm.bias.grad,
        "mean": norm.running_mean,
        "variance": norm.running_variance,
        "evaluated": norm(rows),
    }
    return {name: value.detach().double() for name, value in values.items()}


def whole_pass() -> dict[str, Tensor]:
    norm = nn.BatchNorm1d(WIDTH).double()
    with torch.no_grad():
        norm.weight.copy_(SCALE)
        norm.bias.copy_(SHIFT)
    rows = ROWS.double().requires_grad_()
    output = norm(rows)
    (output * PULL.double()).sum().backward()
    norm.eval()
    values = {
        "output": output,
        "rows_grad": rows.grad,
        "weight_grad": norm.weight.grad,
        "bias_grad": norm.bias.grad,
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "evaluated": norm(rows),
    }
    return {name: value.detach() for name, value in values.items()}


def check(parts: list[dict[str, Tensor]]) -> None:
    whole = whole_pass()
    for name in ("output", "rows_grad", "evaluated"):
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined, whole[name], rtol=1e-5, atol=2e-6)
    for name in ("weight_grad", "bias_grad"):
        total = torch.stack([part[name] for part in parts]).sum(dim=0)
        torch.testing.assert_close(total, whole[name], rtol=1e-5, atol=2e-5)
    for name in ("mean", "variance"):
        for part in parts:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-5, atol=1e-6)


def test_one_rank_equals_torch() -> None:
    check([shared_pass(Comm.solo(), (11,))])


def test_two_ranks_with_different_row_counts_equal_torch_on_all_rows() -> None:
    check(run_ranks(shared_pass, 2, (7, 4)))


def test_a_pass_without_gradient_uses_the_batch_but_moves_nothing() -> None:
    norm = GlobalBatchNorm(WIDTH, Comm.solo())
    with torch.no_grad():
        output = norm(ROWS)
    assert torch.equal(norm.running_mean, torch.zeros(WIDTH))
    assert torch.equal(norm.running_variance, torch.ones(WIDTH))
    torch.testing.assert_close(output.mean(dim=0), torch.zeros(WIDTH), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cast_twice", [False, True])
def test_statistics_survive_a_cast_to_bfloat16(cast_twice: bool) -> None:
    norm = GlobalBatchNorm(WIDTH, Comm.solo())
    norm(ROWS)
    before = norm.running_mean.clone(), norm.running_variance.clone()
    norm.bfloat16()
    if cast_twice:
        norm.to(torch.float16).bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_variance, before[1])
    assert norm(ROWS.bfloat16()).dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32


def test_large_means_do_not_cancel() -> None:
    rows = ROWS + 1e4
    norm = GlobalBatchNorm(WIDTH, Comm.solo())
    expected = nn.BatchNorm1d(WIDTH).double()(rows.double())
    torch.testing.assert_close(norm(rows).double(), expected, rtol=1e-3, atol=1e-3)


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_running_statistics():
    norm = GlobalBatchNorm(WIDTH, Comm.solo())
    norm(ROWS.clone().requires_grad_())
    mean, variance = norm.running_mean.clone(), norm.running_variance.clone()
    poisoned = ROWS.clone()
    poisoned[3, 2] = float("nan")
    norm(poisoned.requires_grad_())
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_variance, variance)
