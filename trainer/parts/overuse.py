"""The setting of a penalty on prototypes that everything uses, against collapse."""

from __future__ import annotations

from pydantic import Field

from trainer.config import Frozen
from trainer.losses.usage import warm_up


class OveruseConfig(Frozen):
    """(K / prototypes in use)^2 of all ranks' samples: 1 where all K are used equally. N samples
    that each choose one sharply use N prototypes at most."""

    weight: float = Field(default=1e-3, gt=0)
    """Of the penalty in the loss."""
    steps: int = Field(default=0, ge=0)
    """Steps over which the weight grows from 0, with the square of the step."""

    def weight_at(self, step: int) -> float:
        return self.weight * warm_up(step, self.steps)
