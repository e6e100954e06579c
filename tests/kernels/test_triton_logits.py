"""The Triton kernels by Triton's interpreter: the same arithmetic, one program after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.kernels.interpreter import rows_of
from trainer.kernels.autotune import KernelSizes
from trainer.kernels.prototype_logits import prototype_logits
from trainer.kernels.way import Way

pytest.importorskip("triton", reason="Triton's wheel is for Linux")

TOLERANCES = {
    # Probabilities are written in the operands' precision: 11 and 8 bits. The gradient of the scale
    # is one number, what is left of terms that cancel.
    "float32": {"value": 2e-5, "cosine": 2e-7, "queries": 1e-5, "rows": 1e-5, "scale": 5e-4},
    "float16": {"value": 2e-5, "cosine": 2e-7, "queries": 2e-3, "rows": 2e-3, "scale": 2e-3},
    "bfloat16": {"value": 2e-5, "cosine": 2e-7, "queries": 1.5e-2, "rows": 1.5e-2},
}


def test_values_and_gradients_equal_float64_on_ragged_shapes() -> None:
    """Fixed reference and running maximum, ceilings, weights, several blocks and splits, kept
    exponentials and recomputed ones, sizes of all architectures, and the same bits twice."""
    rows = rows_of("tests.kernels.interpreted")
    assert rows.pop()["repeats"]
    assert rows.pop()["repeats"]
    assert len(rows) >= 29
    for row in rows:
        case = row["case"]
        # What is kept of halves is bfloat16.
        rounded = case["dtype"] == "float16" and case.get("kept_gib")
        tolerances = TOLERANCES["bfloat16" if rounded else case["dtype"]]
        for name, error in row["errors"].items():
            assert error <= tolerances[name], row
    assert {row["case"]["dtype"] for row in rows} == set(TOLERANCES)


@pytest.mark.gpu
def test_on_a_gpu_two_runs_have_equal_bits_and_timed_sizes_agree() -> None:
    """With prototypes that are positives of very many samples, whose gradients meet in one row."""
    draw = torch.Generator().manual_seed(1)
    queries, rows = (normalize(torch.randn(n, 96, generator=draw)).cuda() for n in (3000, 20_001))
    positives = torch.randint(50, (3000, 4), generator=draw).cuda()

    def run(sizes: KernelSizes) -> list[Tensor]:
        way = Way(kernel_sizes=sizes)
        leaves = queries.clone().requires_grad_(), rows.clone().requires_grad_()
        total, cosines = prototype_logits(*leaves, positives, scale=64.0, way=way)
        gradients = torch.autograd.grad(total.mean() - cosines.square().mean(), leaves)
        return [total.detach(), cosines.detach(), *gradients]

    first, again, timed = run("fixed"), run("fixed"), run("timed")
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for one, other in zip(first, timed, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=float(one.abs().max()) * 2e-3)
