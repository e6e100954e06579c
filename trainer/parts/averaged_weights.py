"""An average of the trained weights over the steps: a momentum copy of the model.

After each applied step, w_avg = m w_avg + (1 - m) w, in float32. Each rank averages the piece of
the weights that it holds itself, at every ZeRO stage, so nothing is sent. The copy has no model: to
run on it, it changes places with the weights for a while. Buffers (running statistics of a batch
norm) and frozen weights are the model's own; the former are averages already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.config import AverageConfig
from trainer.engine.masters import write_piece
from trainer.errors import CheckpointError

if TYPE_CHECKING:  # deepspeed is imported where it is wanted
    from trainer.engine.zero import Engine


class AveragedWeights:
    """A Part that follows the trained weights of an engine."""

    def __init__(self, config: AverageConfig, *, steps: int) -> None:
        self._config = config
        self._steps = steps

    def attach(self, engine: Engine) -> None:
        """Begin at the weights that the engine has now."""
        self._engine = engine
        self._copy = engine.weight_copy()

    def gradients_finite(self) -> None:
        return None

    @torch.no_grad()
    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        if not applied or not self._copy.values:
            return
        share = 1.0 - momentum_at(step, self._steps, self._config)
        weights, averages = (
            [piece.values for piece in pieces.values()]
            for pieces in (self._copy.weights, self._copy.values)
        )
        torch._foreach_lerp_(averages, weights, share)

    def applied(self) -> AbstractContextManager[None]:
        """The engine runs on the average inside; all ranks enter, and take no step there."""
        return self._engine.running_on(self._copy.values)

    def state_share(self) -> Iterator[tuple[str, Tensor]]:
        return self._engine.wholes_share(self._copy.values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if differing := sorted(set(state) ^ set(self._copy.values)):
            raise CheckpointError(
                f"the average of weights in the checkpoint is of another model: {differing[0]} "
                "stands on one side only"
            )
        for name, piece in self._copy.values.items():
            write_piece(piece, state[name])


def momentum_at(step: int, steps: int, config: AverageConfig) -> float:
    """How much of the average stays after the step of this number, counted from 0.

    From `momentum` to `final_momentum` by half a cosine over the run (arXiv 2006.07733).
    """
    rest = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / steps)))
    return config.final_momentum - (config.final_momentum - config.momentum) * rest
