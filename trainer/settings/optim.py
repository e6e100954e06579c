"""What moves the weights, and which of them count: the last ones or their average."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.settings.section import Frozen


class OptimConfig(Frozen):
    """AdamW with a cosine schedule."""

    learning_rate: float = Field(default=5e-4, gt=0)
    """At the end of the warm-up; from there it falls by half a cosine to zero at the last step."""
    image_learning_rate: float | None = None
    """For the image tower, where it differs."""
    text_learning_rate: float | None = None
    """For the text tower, where it differs."""
    layer_decay: float = Field(default=1.0, gt=0, le=1.0)
    """The learning rate of a layer is this to the power of its depth below the top."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Share of the mean and of the mean square of gradients that stays, per step."""
    epsilon: float = 1e-6
    """Added to the root of the mean square that a step is divided by."""
    weight_decay: float = 0.2
    """Share of a weight that a step takes away, times the learning rate; matrices only."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate grows from zero, in a line."""
    clip_norm: float = Field(default=10.0, gt=0)
    """Global gradient norm, in units of the true gradient of the global batch."""


class AverageConfig(Frozen):
    """A momentum copy of the trained weights, averaged after each step in float32."""

    momentum: float = Field(default=0.996, ge=0, le=1)
    """Share of the average that stays, at the first step."""
    final_momentum: float = Field(default=1.0, ge=0, le=1)
    """The same at the last step; from one to the other by half a cosine."""


Weights = Literal["trained", "averaged"]
"""Which weights of a run: as the last step left them, or their average over the steps."""
