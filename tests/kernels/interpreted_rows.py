"""AdamW of rows by Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.kernels.interpreted_rows` prints a row for each case: what
differs in a bit from one operation after another in float32, and the largest difference from the
optimizer's own form on CPUs, where torch fuses some of them.
"""

from __future__ import annotations

import json
import math
import sys
from unittest.mock import PropertyMock, patch

import numpy as np
import torch
from torch import Tensor

from trainer.parts.row_optimizer import RowOptimizer, RowOptimizerConfig

COUNT, STEPS = 29, 6
DIMS = (1, 5, 64, 1030)
"""Powers of two or not; more than fit into a program's registers at once."""


def after(rows: Tensor, gradients: list[Tensor], places: list[Tensor | None], *, by_kernel: bool):
    config = RowOptimizerConfig(learning_rate=0.05, weight_decay=0.3)
    optimizer = RowOptimizer(rows.clone(), config)
    with patch.object(RowOptimizer, "_by_kernel", PropertyMock(return_value=by_kernel)):
        for step, (some, gradient) in enumerate(zip(places, gradients, strict=True)):
            optimizer.settle(some)
            optimizer.update(some, gradient.clone(), factor=1.0 / (1 + step))
    return {"rows": optimizer.rows, "steps": optimizer.steps.float(), **optimizer.moments}


def one_after_another(
    rows: Tensor, gradients: list[Tensor], places: list[Tensor | None]
) -> dict[str, Tensor]:
    """As the paper has it, with the decay that a row owes."""
    rows, mean, square = rows.clone(), torch.zeros_like(rows), torch.zeros_like(rows)
    log_decay, paid, counts = 0.0, torch.zeros(COUNT, dtype=torch.float64), torch.zeros(COUNT)
    for step, (some, slope) in enumerate(zip(places, gradients, strict=True)):
        at, rate = slice(None) if some is None else some, 0.05 * (1.0 / (1 + step))
        rows[at] = rows[at] * (log_decay - paid[at]).exp().float()[:, None]
        counts[at] += 1
        mean[at] = mean[at] + (1 - 0.9) * (slope - mean[at])
        square[at] = square[at] * 0.98 + (1 - 0.98) * slope * slope
        count = counts[at].double()[:, None]
        root = torch.from_numpy(np.sqrt(square[at].numpy()))  # torch's is off by a bit at times
        below = root / (1 - 0.98**count).sqrt().float() + 1e-8
        size = (rate / (1 - 0.9**count)).float()
        rows[at] = rows[at] * (1 - rate * 0.3) - mean[at] / below * size
        log_decay += math.log1p(-rate * 0.3)
        paid[at] = log_decay
    return {"rows": rows, "steps": counts, "exp_avg": mean, "exp_avg_sq": square}


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def main() -> None:
    draw = torch.Generator().manual_seed(3)
    for dim in DIMS:
        rows = torch.randn(COUNT, dim, generator=draw)
        for dense in (False, True):
            some = [None if dense else torch.randperm(COUNT, generator=draw)[:9]] * STEPS
            size = COUNT if dense else 9
            slopes = [torch.randn(size, dim, generator=draw) for _ in range(STEPS)]
            ours, torchs = (after(rows, slopes, some, by_kernel=way) for way in (True, False))
            plain = one_after_another(rows, slopes, some)
            row = {
                "dim": dim,
                "moved": bool((ours["rows"] != rows).any()),
                "bits": [name for name in ours if not torch.equal(ours[name], plain[name])],
                "difference": max(difference(ours[name], torchs[name]) for name in ours),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
