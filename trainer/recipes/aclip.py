"""A-CLIP: CLIP on the half of the patches that a momentum copy attends to (arXiv 2212.08653).

    L = mean over views v of CLIP(I_v, T) + w_s SimCLR(z_1, z_2) + w_b mean over v of BYOL(p_v, t)

Two views of an image are encoded from the patches with the highest [CLS] attention of the copy, in
the mean over its layers and heads. The copy sees one crop that holds both; t is its projection of
that crop. Where the published code differs from the paper, `parity` says which is meant: the code
gives SimCLR the first view twice, keeps one group of patches more, and its crop mostly misses a
part of a view. One view, no further terms and all patches are CLIP.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import PositiveInt, RecipeConfig, ViewsConfig
from trainer.losses.contrastive import info_nce
from trainer.models.self_supervised import build_towers_of_views, freeze_patch_projection
from trainer.models.two_tower import TwoTower, TwoTowerConfig
from trainer.parts.self_supervision import (
    ByolConfig,
    ComparesViews,
    SimclrConfig,
    mean_over_views,
    self_supervision,
)
from trainer.parts.token_selection import TokensConfig, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(ComparesViews, RecipeConfig):
    """Defaults are the paper's."""

    name: Literal["aclip"] = "aclip"
    model: TwoTowerConfig = TwoTowerConfig()
    parity: Literal["paper", "code"] = "paper"
    """What holds where the published code differs from the paper."""
    views: PositiveInt = 2
    """Random views of an image, each drawn as `data.augment` says. A flip costs nothing here: the
    scores are mirrored with it."""
    tokens: TokensConfig = TokensConfig()
    """Which patches of a view are read."""
    simclr: SimclrConfig | None = SimclrConfig()
    """None leaves the term out."""
    byol: ByolConfig | None = ByolConfig()
    """None leaves the term out."""
    frozen_patches: bool = True
    """Keep the projection of patches as it is drawn."""

    def wanted_views(self) -> ViewsConfig:
        views = super().wanted_views()
        if self.parity == "code" and views.geometry == "covering":
            return views.model_copy(update={"geometry": "as_published"})
        return views

    @model_validator(mode="before")
    @classmethod
    def _as_many_groups_as_the_code(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("parity") != "code":
            return values
        tokens = values.get("tokens", {})
        if not isinstance(tokens, dict) or tokens.get("select") in ("none", "random"):
            return values
        return {**values, "tokens": {"rounding": "floor_plus_one", **tokens}}

    @model_validator(mode="after")
    def _two_views_of_the_code(self) -> Config:
        if self.parity == "code" and self.views != 2:
            raise ValueError(f"parity code is for two views, not {self.views}")
        return self


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    model = build_towers_of_views(
        *(config.model, tokenizer, comm or Comm.solo()),
        heads=config.heads,
        views=config.views,
        seed=seed,
    )
    if config.frozen_patches:
        freeze_patch_projection(model)
    return model


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.comm = config, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = token_parts(config, context, self.model, views=config.views)

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        text, scale = features.tensor("text"), features.tensor("logit_scale")
        clip = mean_over_views(features, lambda view: info_nce(view, text, scale, self.comm))
        # The published code's pair is the first view and itself.
        pairs = [(0, 0)] if self.config.parity == "code" else None
        terms = self_supervision(self.config, features, batch, self.comm, pairs=pairs)
        return Losses.of(clip=clip) + terms
