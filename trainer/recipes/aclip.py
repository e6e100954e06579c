"""A-CLIP: CLIP on the half of the patches that a momentum copy attends to (arXiv 2212.08653).

    L = mean over views v of CLIP(I_v, T) + w_s SimCLR(z_1, z_2) + w_b mean over v of BYOL(p_v, t)

Two views of an image are encoded from the patches with the highest [CLS] attention of the copy, in
the mean over its layers and heads. The copy sees one crop that holds both; t is its projection of
that crop. Where the published code differs from the paper, `parity` says which is meant: the code
gives SimCLR the first view twice, keeps one group of patches more, and its crop mostly misses a
part of a view. One view, no further terms and all patches are CLIP.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt, RecipeConfig, ViewsConfig
from trainer.losses.byol import byol_loss
from trainer.losses.contrastive import info_nce
from trainer.losses.simclr import nt_xent
from trainer.models.aclip_model import AclipModel, SelfSupervisedHeads, build_aclip_model
from trainer.models.config import HeadConfig
from trainer.models.two_tower import TwoTowerConfig
from trainer.parts.token_selection import SelectsTokens, TokensConfig, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class SimclrConfig(Frozen):
    """Views of an image find each other."""

    weight: float = Field(default=1.0, gt=0)
    """w_s."""
    temperature: float = Field(default=0.1, gt=0)
    """Cosines are divided by it."""
    head: HeadConfig = HeadConfig(layers=2, hidden=4096, dim=256)


class ByolConfig(Frozen):
    """Views predict what the momentum copy says of the image."""

    weight: float = Field(default=2.0, gt=0)
    """w_b."""
    head: HeadConfig = HeadConfig(layers=1, hidden=4096, dim=256)
    """Of the projector; the predictor behind it is of the same sizes."""


class Config(SelectsTokens, RecipeConfig):
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

    @property
    def needs_copy(self) -> bool:
        return self.byol is not None or self.tokens.scores

    def wanted_views(self) -> ViewsConfig:
        views = self.views_of(self.views)
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
    def _enough_views(self) -> Config:
        if self.simclr is not None and self.views < 2:
            raise ValueError("simclr compares views of an image: set views=2, or simclr=null")
        if self.parity == "code" and self.views != 2:
            raise ValueError(f"parity code is for two views, not {self.views}")
        return self


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> AclipModel:
    heads = SelfSupervisedHeads(
        simclr=None if config.simclr is None else config.simclr.head,
        byol=None if config.byol is None else config.byol.head,
    )
    return build_aclip_model(
        *(config.model, tokenizer, comm or Comm.solo()),
        heads=heads,
        frozen_patches=config.frozen_patches,
        seed=seed,
    )


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.comm = config, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = token_parts(config, context, self.model, views=config.views)

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        text, scale = features.tensor("text"), features.tensor("logit_scale")
        said = features.more or {}
        views = [features.tensor("image")]
        views += said["further"].unbind(1) if "further" in said else ()
        clip = [info_nce(view, text, scale, self.comm) for view in views]
        losses = Losses.of(clip=clip[0] if len(clip) == 1 else torch.stack(clip).mean())
        if self.config.simclr is not None:
            simclr = self._simclr(said["simclr"], self.config.simclr.temperature)
            losses = losses.with_term("simclr", simclr, self.config.simclr.weight)
        if self.config.byol is not None:
            assert batch.more is not None, "the copy has said nothing"
            byol = byol_loss(said["byol"], batch.more["byol_target"])
            losses = losses.with_term("byol", byol, self.config.byol.weight)
        return losses

    def _simclr(self, rows: Tensor, temperature: float) -> Tensor:
        """The mean over pairs of views; the published code's pair is the first view and itself."""
        views = rows.unbind(1)
        pairs = [(0, 0)] if self.config.parity == "code" else combinations(range(len(views)), 2)
        terms = [nt_xent(views[a], views[b], self.comm, temperature=temperature) for a, b in pairs]
        return torch.stack(terms).mean()
