"""Rows in bfloat16 by Triton's interpreter, beside the same in torch's operations.

`TRITON_INTERPRET=1 python -m tests.kernels.interpreted_half_rows` prints a row for each case: what
differs in a bit.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import PropertyMock, patch

import numpy as np
import torch
from torch import Tensor

from trainer.parts import half_rows
from trainer.parts.half_rows import HalfRowOptimizer
from trainer.parts.row_optimizer import Places, RowOptimizerConfig

COUNT, STEPS = 29, 6
DIMS = (1, 5, 64, 1030)
"""Powers of two or not; more than fit into a program's registers at once."""


def after(
    rows: Tensor, gradients: list[Tensor], places: list[Places], *, by_kernel: bool
) -> dict[str, Tensor]:
    config = RowOptimizerConfig(learning_rate=0.05, weight_decay=0.3, rows="bfloat16")
    held = HalfRowOptimizer(rows, config, first=100, seed=5)
    with (
        patch.object(HalfRowOptimizer, "_by_kernel", PropertyMock(return_value=by_kernel)),
        patch.object(half_rows, "root", lambda values: torch.from_numpy(np.sqrt(values.numpy()))),
    ):
        for step, (some, gradient) in enumerate(zip(places, gradients, strict=True)):
            held.update(some, gradient.clone(), factor=1.0 / (1 + step))
    return {"rows": held.rows, "steps": held.steps, **held.moments}


def main() -> None:
    draw = torch.Generator().manual_seed(3)
    for dim in DIMS:
        rows = torch.randn(COUNT, dim, generator=draw)
        for whole in (False, True):
            some = [None if whole else torch.randperm(COUNT, generator=draw)[:9]] * STEPS
            slopes = [torch.randn(COUNT if whole else 9, dim, generator=draw) for _ in range(STEPS)]
            ours, torchs = (after(rows, slopes, some, by_kernel=way) for way in (True, False))
            row = {
                "dim": dim,
                "moved": bool((ours["rows"] != rows.bfloat16()).any()),
                "bits": [name for name in ours if not torch.equal(ours[name], torchs[name])],
            }
            print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
