"""SigLIP: a sigmoid on every image-text pair (arXiv 2303.15343). The other baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from trainer.config import RecipeConfig
from trainer.losses.sigmoid import sigmoid_loss
from trainer.models.two_tower import TwoTowerConfig, build_two_tower
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig):
    name: Literal["siglip"] = "siglip"
    model: TwoTowerConfig = TwoTowerConfig()


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.comm = context.comm
        model = config.model.model_copy(update={"head": None}).with_bias()
        self.model = build_two_tower(model, context.tokenizer, context.comm, seed=context.seed)
        self.parts: Mapping[str, Part] = {}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        assert features.image is not None
        assert features.text is not None
        assert features.logit_scale is not None
        assert features.logit_bias is not None
        loss = sigmoid_loss(
            features.image, features.text, features.logit_scale, features.logit_bias, self.comm
        )
        return Losses.of(siglip=loss)
