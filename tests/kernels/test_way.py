"""Which program a way means, and that nothing it says goes unread."""

from __future__ import annotations

import pytest
import torch

from trainer.kernels.one_pass import serves_one_pass
from trainer.kernels.way import Way

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_kernels_run_on_a_gpu_or_where_they_are_asked_for() -> None:
    assert Way().operands(CPU) is None
    assert Way().operands(GPU) == torch.float16
    assert Way(backend="torch").operands(GPU) is None
    assert Way(backend="triton", operand_dtype=torch.bfloat16).operands(CPU) == torch.bfloat16


def test_a_tile_is_not_for_kernels() -> None:
    assert Way(tile=(2, 3)).operands(CPU) is None
    with pytest.raises(AssertionError, match="no tiles to choose"):
        Way(tile=(2, 3)).operands(GPU)


@pytest.mark.parametrize(
    ("way", "device", "scale", "serves"),
    [
        (Way(), CPU, 64.0, True),
        (Way(kernel_sizes="timed"), CPU, 64.0, True),
        (Way(), CPU, 81.0, False),
        (Way(tile=(4, 4)), CPU, 64.0, False),
        (Way(backend="triton"), CPU, 64.0, False),
        (Way(), GPU, 64.0, False),
        (Way(backend="torch"), GPU, 64.0, False),
    ],
)
def test_gradients_in_one_pass_are_for_plain_torch_in_pieces_of_its_own(
    way: Way, device: torch.device, scale: float, serves: bool
) -> None:
    assert serves_one_pass(100, 8, scale=scale, way=way, device=device) == serves
