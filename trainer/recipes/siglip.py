"""SigLIP: a sigmoid on every image-text pair (arXiv 2303.15343). The other baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.losses.sigmoid import sigmoid_loss
from trainer.models.config import SigmoidTwoTower
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.parts.known_groups import KnownGroups, KnowsGroups
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(SelectsTokens, KnowsGroups, RecipeConfig):
    name: Literal["siglip"] = "siglip"
    model: SigmoidTwoTower = Field(default=TwoTowerConfig(), validate_default=True)
    reads = frozenset({"bias"})


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
        self.comm = context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = token_parts(config, context, self.model)
        self.groups = KnownGroups(config, context, dim=config.model.embed_dim)
        self.parts |= self.groups.parts

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        assert features.image is not None
        assert features.text is not None
        assert features.logit_scale is not None
        assert features.logit_bias is not None
        loss = sigmoid_loss(
            features.image, features.text, features.logit_scale, features.logit_bias, self.comm
        )
        return Losses.of(siglip=loss) + self.groups.losses(features.image, batch, step)
