"""PALM: an image tower against mixtures of prototypes that follow it (arXiv 2402.02653).

    L = -mean_i log p(class of i | z_i) + weight * contrast of prototypes

Views of an image are samples of its class. They are assigned to the prototypes of that class,
which move towards them by momentum; then both terms are taken. What comes out is meant for telling
images of no known class. `parity` says which form of the terms is meant: the paper's or the code's.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import PositiveInt, RecipeConfig, ViewsConfig
from trainer.models.config import HeadConfig
from trainer.models.image_tower import ImageTowerConfig
from trainer.models.views_tower import ViewsTower, build_views_tower, compared_views
from trainer.parts.palm_prototypes import PalmPrototypes, PalmPrototypesConfig, palm_labels
from trainer.parts.stored_features import stored_features
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig, PalmPrototypesConfig):
    """Where the model has a head, its output is compared; evaluations see the embedding."""

    name: Literal["palm"] = "palm"
    model: ImageTowerConfig = ImageTowerConfig(head=HeadConfig(hidden=512, norm="none"))
    views: PositiveInt = 2
    """Random views of an image, each drawn as `data.augment` says; of stored features, as many
    different ones of those that are stored."""
    reads = frozenset({"head", "stored"})

    @model_validator(mode="after")
    def _two_views_without_labels(self) -> Config:
        if self.unlabelled is not None and self.views < 2:
            raise ValueError("`unlabelled` compares views of an image; give views: 2 or more")
        return self

    def wanted_views(self) -> ViewsConfig:
        return ViewsConfig(count=self.views)


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> ViewsTower:
    return build_views_tower(config.model, comm, seed=seed)


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.model = build_model(config, context.text_tokenizer, context.comm, seed=context.seed)
        self.labels = palm_labels(config, context)
        self.prototypes = PalmPrototypes(
            config,
            num_classes=1 if self.labels is None else self.labels.num_clusters,
            dim=config.model.compared_dim,
            comm=context.comm,
            seed=context.seed,
            views=config.views,
        )
        features = stored_features(
            config.model, context.comm, views=config.views, seed=context.seed
        )
        self.parts: dict[str, Part] = {"prototypes": self.prototypes, **features}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """Every view is a sample; the terms are over the batch of all ranks."""
        views = compared_views(features)
        labels = torch.zeros_like(batch.sample_id)
        if self.labels is not None:
            labels = self.labels.of(batch.sample_id)
        every = labels[:, None].expand(views.shape[:2]).flatten()
        result = self.prototypes.terms(views.flatten(0, 1), every)
        losses = Losses.of(likelihood=result.likelihood)
        if self.config.contrast_weight:
            losses = losses.with_term("contrast", result.contrast, self.config.contrast_weight)
        return losses.with_term("labelled", (labels >= 0).to(torch.float32).mean(), 0.0)
