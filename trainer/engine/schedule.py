"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor on the base learning rate: linear from 0 to 1, then half a cosine down to 0.

    Step `s` (counted from 0) is the s-th update. The first warm-up step already moves: its
    factor is 1 / warmup_steps. The last step's factor is just above 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
