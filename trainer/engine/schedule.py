"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from trainer.config import OptimConfig


def learning_rate_factor(step: int, optim: OptimConfig, *, total_steps: int) -> float:
    """Factor on the base learning rate of step `step`, counted from 0, as a run's file says."""
    warmup = optim.warmup_steps
    if optim.schedule == "cosine":
        return warmup_cosine(step, warmup_steps=warmup, total_steps=total_steps)
    if step < warmup:
        return (step + 1) / warmup
    return cooldown(step - (total_steps - optim.cooldown_steps), optim)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Factor on the base learning rate: linear from 0 to 1, then half a cosine down to 0.

    Step `s` (counted from 0) is the s-th update. The first warm-up step already moves: its
    factor is 1 / warmup_steps. The last step's factor is just above 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def cooldown(step: int, optim: OptimConfig) -> float:
    """Factor `step` steps behind the beginning of a cool-down: 1 until there, 0 at its end.

    A line, or 1 - sqrt of the share that is over (arXiv 2405.18392, section 4). As with the cosine
    the first step has the full rate and the last one a little.
    """
    if step <= 0:
        return 1.0
    share = min(1.0, step / optim.cooldown_steps)
    return 1.0 - (share if optim.cooldown == "linear" else math.sqrt(share))
