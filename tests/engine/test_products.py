"""Which float32 products a step may round, and that nobody else's are."""

from __future__ import annotations

import pytest
import torch

from trainer.engine.products import fast_float32_products


@pytest.mark.parametrize(("device", "inside"), [("cuda", "tf32"), ("cpu", None)])
def test_a_gpu_rounds_in_a_step_and_not_behind_it(device: str, inside: str | None) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []

    def fails() -> None:
        with fast_float32_products(torch.device(device)):
            seen.append(matmul.fp32_precision)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [inside or before]
    assert matmul.fp32_precision == before


def test_cosines_of_operands_with_ten_bits_are_off_by_2e_5() -> None:
    """What TF32 does to the operands, done on the CPU."""
    draw = torch.Generator().manual_seed(0)
    one, other = (
        torch.nn.functional.normalize(torch.randn(256, 512, generator=draw), dim=1)
        for _ in range(2)
    )
    short = [
        ((rows.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) for rows in (one, other)
    ]
    error = short[0].double() @ short[1].double().T - one.double() @ other.double().T
    assert float(error.square().mean().sqrt()) < 2e-5
