"""Views of an image that find or predict each other, as terms of any recipe with two towers.

    w_s SimCLR(z_1, z_2) + w_b mean over v of BYOL(p_v, t)

All views go through the image tower in one pass, each is matched with the text, and heads of their
own read what the tower's projection reads. t is what a momentum copy says of one crop that holds
all views. As SLIP (arXiv 2112.12750) and A-CLIP (arXiv 2212.08653) add them to CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt, ViewsConfig
from trainer.losses.byol import byol_loss
from trainer.losses.simclr import nt_xent
from trainer.models.config import HeadConfig
from trainer.models.self_supervised import SelfSupervisedHeads
from trainer.parts.token_selection import SelectsTokens
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


class ComparesViews(SelectsTokens):
    """Of a recipe whose image tower may be shown several views of an image. Stands before
    `RecipeConfig` among the bases of a `Config`, because it knows better which views are wanted."""

    views: PositiveInt = 1
    """Random views of an image, each drawn as `data.augment` says, and each matched with its
    text."""
    simclr: SimclrConfig | None = None
    """None leaves the term out."""
    byol: ByolConfig | None = None
    """None leaves the term out."""

    @property
    def needs_copy(self) -> bool:
        return self.byol is not None or super().needs_copy

    @property
    def heads(self) -> SelfSupervisedHeads:
        return SelfSupervisedHeads(
            simclr=None if self.simclr is None else self.simclr.head,
            byol=None if self.byol is None else self.byol.head,
        )

    def wanted_views(self) -> ViewsConfig:
        return self.views_of(self.views)

    @model_validator(mode="after")
    def _enough_views(self) -> ComparesViews:
        if self.simclr is not None and self.views < 2:
            raise ValueError("simclr compares views of an image: set views=2, or simclr=null")
        return self


def mean_over_views(
    features: Features, loss: Callable[[Float[Tensor, "batch dim"]], Float[Tensor, ""]]
) -> Float[Tensor, ""]:
    """The mean of a loss of image rows over the views of the images."""
    first, said = features.tensor("image"), features.more or {}
    if "further" not in said:
        return loss(first)
    return torch.stack([loss(view) for view in (first, *said["further"].unbind(1))]).mean()


def self_supervision(
    config: ComparesViews,
    features: Features,
    batch: Batch,
    comm: Comm,
    *,
    pairs: Iterable[tuple[int, int]] | None = None,
) -> Losses:
    """The terms `simclr` and `byol` that are asked for. `pairs` of views find each other; all where
    None."""
    losses, said = Losses(), features.more or {}
    if config.simclr is not None:
        views = said["simclr"].unbind(1)
        terms = [
            nt_xent(views[a], views[b], comm, temperature=config.simclr.temperature)
            for a, b in pairs or combinations(range(len(views)), 2)
        ]
        losses = losses.with_term("simclr", torch.stack(terms).mean(), config.simclr.weight)
    if config.byol is not None:
        assert batch.more is not None, "the copy has said nothing"
        byol = byol_loss(said["byol"], batch.more["byol_target"])
        losses = losses.with_term("byol", byol, config.byol.weight)
    return losses
