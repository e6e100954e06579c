"""SigLIP: a sigmoid on every image-text pair (arXiv 2303.15343). The other baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.losses.sigmoid import sigmoid_loss
from trainer.models.config import SigmoidTwoTower
from trainer.models.self_supervised import build_towers_of_views
from trainer.models.two_tower import TwoTower, TwoTowerConfig
from trainer.parts.caption_tokens import CaptionTokens, LearnsCaptionTokens
from trainer.parts.distillation import Distillation, Distils
from trainer.parts.known_groups import KnownGroups, KnowsGroups
from trainer.parts.self_supervision import ComparesViews, mean_over_views, self_supervision
from trainer.parts.token_selection import token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(ComparesViews, Distils, LearnsCaptionTokens, KnowsGroups, RecipeConfig):
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
    return build_towers_of_views(
        *(config.model, tokenizer, comm or Comm.solo()),
        heads=config.heads,
        views=config.views,
        seed=seed,
    )


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.comm = config, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = token_parts(config, context, self.model, views=config.views)
        self.distilled = Distillation(config, config.model, context)
        self.parts |= self.distilled.parts
        self.groups = KnownGroups(config, context, dim=config.model.embed_dim)
        self.words = CaptionTokens(config, context, dim=config.model.embed_dim)
        self.parts |= self.groups.parts | self.words.parts

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        image, text = features.tensor("image"), features.tensor("text")
        scale, bias = features.tensor("logit_scale"), features.tensor("logit_bias")
        loss = mean_over_views(
            features, lambda view: sigmoid_loss(view, text, scale, bias, self.comm)
        )
        losses = Losses.of(siglip=loss)
        losses += self_supervision(self.config, features, batch, self.comm)
        losses += self.distilled.losses(features, batch)
        losses += self.words.losses(image, batch, step)
        return losses + self.groups.losses(image, batch, step)
