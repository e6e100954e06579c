"""CLIP: symmetric InfoNCE over the global batch (arXiv 2103.00020). The baseline.

With `distill`, the student also learns the similarities that a frozen pair of towers sees (with
`weight: 0` these alone, as TinyCLIP does, arXiv 2309.12314); with `prototypes`, its images are also
compared with learnable rows for clusters or classes; with `simclr` or `byol`, views of an image
also with each other.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.losses.contrastive import info_nce
from trainer.models.self_supervised import build_towers_of_views
from trainer.models.two_tower import TwoTower, TwoTowerConfig
from trainer.parts.caption_tokens import CaptionTokens, LearnsCaptionTokens
from trainer.parts.distillation import Distillation, Distils
from trainer.parts.known_groups import KnownGroups, KnowsGroups
from trainer.parts.prototypes import PrototypesTerm, WeightedPrototypesConfig
from trainer.parts.self_supervision import ComparesViews, mean_over_views, self_supervision
from trainer.parts.token_selection import token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(ComparesViews, Distils, LearnsCaptionTokens, KnowsGroups, RecipeConfig):
    name: Literal["clip"] = "clip"
    model: TwoTowerConfig = TwoTowerConfig()
    weight: float = Field(default=1.0, ge=0)
    """Of the contrastive loss; with 0 it is computed and logged, and moves nothing."""
    prototypes: WeightedPrototypesConfig | None = None
    """Clusters or classes of the images as a further term; none where None."""

    @model_validator(mode="after")
    def _both_towers_learn(self) -> Config:
        if self.weight == 0 and self.distill is None:
            raise ValueError("weight is 0, so that no text would be learned from; set distill")
        return self


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
        self.comm, self.config = context.comm, config
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = token_parts(config, context, self.model, views=config.views)
        self.distilled = Distillation(config, config.model, context)
        self.parts |= self.distilled.parts
        self.groups = KnownGroups(config, context, dim=config.model.embed_dim)
        self.words = CaptionTokens(config, context, dim=config.model.embed_dim)
        self.parts |= self.groups.parts | self.words.parts
        self.prototypes: PrototypesTerm | None = None
        if config.prototypes is not None:
            dim = config.model.embed_dim
            self.prototypes = PrototypesTerm(config.prototypes, context, dim=dim)
            self.parts["head"] = self.prototypes.head

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
        contrastive = mean_over_views(features, lambda view: info_nce(view, text, scale, self.comm))
        losses = Losses().with_term("clip", contrastive, self.config.weight)
        losses += self_supervision(self.config, features, batch, self.comm)
        losses += self.distilled.losses(features, batch)
        losses += self.words.losses(image, batch, step)
        if self.prototypes is not None:
            losses += self.prototypes.losses(features, batch, step)
        return losses + self.groups.losses(image, batch, step)
