"""CLIP: symmetric InfoNCE over the global batch (arXiv 2103.00020). The baseline.

With `distill`, the student also learns the similarities that a frozen pair of towers sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.parts.distillation import DistillConfig, TeacherPair, distillation, teacher_part
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig):
    name: Literal["clip"] = "clip"
    model: TwoTowerConfig = TwoTowerConfig()
    distill: DistillConfig | None = None
    """A frozen teacher, from two embedding stores; none where None."""

    def join(self, seed: int) -> TeacherPair | None:
        return None if self.distill is None else self.distill.join()


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    return build_two_tower(config.model, tokenizer, comm, seed=seed)


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.comm, self.distill = context.comm, config.distill
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: Mapping[str, Part] = (
            {}
            if config.distill is None
            else {"teacher": teacher_part(config.distill, context.data.captions, context.comm)}
        )

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        assert features.image is not None
        assert features.text is not None
        assert features.logit_scale is not None
        losses = Losses.of(
            clip=info_nce(features.image, features.text, features.logit_scale, self.comm)
        )
        if self.distill is None:
            return losses
        value = distillation(self.distill, features, batch, self.comm)
        return losses.with_term("distill", value, self.distill.weight)
