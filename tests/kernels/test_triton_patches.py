"""The loudest patch of each word by Triton's kernels, in its interpreter and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.kernels.patch_maximum import patch_maximum
from trainer.kernels.way import Way

pytest.importorskip("triton", reason="Triton's wheel is for Linux")
ROOT = Path(__file__).parents[2]
MARGINS = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Gradients are multiplied in the operands' precision: 24, 11 and 8 bits. Values are summed in
float32 of any operands."""


def test_values_winners_and_gradients_are_those_of_float64() -> None:
    """Ragged shapes, several tiles of everything, with and without the activation."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_patches"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    *rows, special = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(rows) == 30
    for row in rows:
        assert row["winners"] == 0, row
        assert row["repeats"], row
        assert row["value"] < 2e-6, row
        assert max(row["patches"], row["words"]) < MARGINS[row["dtype"]], row
    assert special["first"] == [[0] * 4], "of equal patches the first"
    assert special["second"] == [[70] * 4]
    assert special["broken"] == [True]
    assert special["empty"] == [1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_what_torch_gives(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(9, 257, 512, generator=draw).to(dtype).float()
    words = torch.randn(3001, 512, generator=draw).to(dtype).float()
    probe = torch.randn(9, 3001, generator=draw)
    found: list[list[Any]] = []
    for device, way in (("cuda", Way(operand_dtype=dtype)), ("cpu", Way(backend="torch"))):
        leaves = [part.to(device).requires_grad_() for part in (patches, words)]
        value = patch_maximum(*leaves, activated=True, way=way)
        (value * probe.to(device)).sum().backward()
        found.append([part.cpu() for part in (value.detach(), *(leaf.grad for leaf in leaves))])
    margin = 2e-3 if dtype == torch.float32 else MARGINS[str(dtype).removeprefix("torch.")]
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 2 * margin
