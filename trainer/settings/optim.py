"""What moves the weights, and which of them count: the last ones or their average."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.settings.section import Frozen, OnlyWhere


class OptimConfig(Frozen):
    """AdamW and the course of its learning rate."""

    learning_rate: float = Field(default=5e-4, gt=0)
    """At the end of the warm-up."""
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
    schedule: Literal["cosine", "constant"] = "cosine"
    """Behind the warm-up: half a cosine down to zero at the last step, or as it is until the
    cool-down. A constant one's steps don't depend on the run's length: runs of several lengths can
    go on from checkpoints of one (`begin_from`)."""
    cooldown_steps: Annotated[int, Field(ge=0), OnlyWhere("schedule", "constant")] = 0
    """Of a constant rate: the last so many steps, over which it falls to zero."""
    cooldown: Annotated[Literal["linear", "one_minus_sqrt"], OnlyWhere("schedule", "constant")] = (
        "one_minus_sqrt"
    )
    """How it falls there: in a line, or by the square root of the share that is over."""
    clip_norm: float = Field(default=10.0, gt=0)
    """Global gradient norm, in units of the true gradient of the global batch."""


class AverageConfig(Frozen):
    """A momentum copy of the trained weights, averaged after each step in float32."""

    momentum: float = Field(default=0.996, ge=0, le=1)
    """Share of the average that stays, at the first step."""
    final_momentum: float = Field(default=1.0, ge=0, le=1)
    """The same at the last step; from one to the other by half a cosine."""

    @property
    def knows_the_end(self) -> bool:
        """Whether a step's momentum depends on how many steps the run has."""
        return self.momentum != self.final_momentum


Weights = Literal["trained", "averaged"]
"""Which weights of a run: as the last step left them, or their average over the steps."""
