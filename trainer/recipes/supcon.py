"""SupCon: an image tower against the other images of a batch, by class (arXiv 2004.11362).

    L = -mean_i mean_p log( exp(s z_i z_p) / sum_a exp(s z_i z_a) )

Views of an image are samples of its class; p runs over the other samples of i's class in the batch
of all ranks, a over all others. With a Mahalanobis score of its features it is what methods for
telling images of no known class are compared with.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import LocalPath, PositiveInt, RecipeConfig, ViewsConfig
from trainer.data.labels import ClusterLabels
from trainer.losses.supcon import supervised_contrast
from trainer.models.config import HeadConfig
from trainer.models.image_tower import ImageTowerConfig
from trainer.models.views_tower import ViewsTower, build_views_tower, compared_views
from trainer.parts.prototypes import check_join, class_columns
from trainer.parts.stored_features import stored_features
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig):
    """Where the model has a head, its output is compared; evaluations see the embedding."""

    name: Literal["supcon"] = "supcon"
    model: ImageTowerConfig = ImageTowerConfig(head=HeadConfig(hidden=512, norm="none"))
    labels: LocalPath | None = None
    """Folder of cluster labels by sample id; a sample is of its nearest cluster."""
    classes: str | None = None
    """Instead of `labels`: a json key of the shards, whose every value is a class."""
    views: PositiveInt = 2
    """Random views of an image, each drawn as `data.augment` says; of stored features, as many
    different ones of those that are stored."""
    temperature: float = Field(default=0.1, ge=0.02)
    """Cosines are divided by it."""
    reads = frozenset({"head", "stored"})

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> Config:
        if (self.labels is None) == (self.classes is None):
            raise ValueError("give either `labels`, a folder, or `classes`, a json key")
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
        self.config, self.comm = config, context.comm
        self.model = build_model(config, context.text_tokenizer, context.comm, seed=context.seed)
        self.labels = _labels(config, context)
        self.parts: dict[str, Part] = stored_features(
            config.model, context.comm, views=config.views, seed=context.seed
        )

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """Every view is a sample; the mean is over those of all ranks that have a class."""
        views = compared_views(features)
        labels = self.labels.of(batch.sample_id)
        every = labels[:, None].expand(views.shape[:2]).flatten()
        loss = supervised_contrast(
            views.flatten(0, 1), every, self.comm, temperature=self.config.temperature
        )
        losses = Losses.of(contrast=loss)
        return losses.with_term("labelled", (labels >= 0).to(torch.float32).mean(), 0.0)


def _labels(config: Config, context: Context) -> ClusterLabels:
    """One class for every sample that has one."""
    if config.labels is None:
        assert config.classes is not None
        return class_columns((config.classes,), context)
    labels = ClusterLabels.open(config.labels)
    check_join(labels, config.labels, context)
    return labels
