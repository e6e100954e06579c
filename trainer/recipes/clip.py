"""CLIP: symmetric InfoNCE over the global batch (arXiv 2103.00020). The baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from trainer.config import RecipeConfig
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import TwoTowerConfig, build_two_tower
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig):
    name: Literal["clip"] = "clip"
    model: TwoTowerConfig = TwoTowerConfig()


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.comm = context.comm
        model = config.model.model_copy(update={"bias": False, "head": None})
        self.model = build_two_tower(model, context.tokenizer, context.comm, seed=context.seed)
        self.parts: Mapping[str, Part] = {}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        assert features.image is not None
        assert features.text is not None
        assert features.logit_scale is not None
        return Losses.of(
            clip=info_nce(features.image, features.text, features.logit_scale, self.comm)
        )
