"""An image tower alone, trained against prototypes that it learns (MLCD, arXiv 2407.17331).

A sample belongs to several clusters, found beforehand by another model, or to classes that its
shard names; features are compared with a learnable row for each cluster, sharded over the ranks.
Also here, by `loss`: `mlc`, its baseline; `pfc_ce`, Partial FC's cross-entropy with one label
(arXiv 2203.15565, CosFace and ArcFace margins, inter-class filter); `slots`, the mean of one
cross-entropy for each label, with shared negatives. `features_kept` is UNICOM's random subspace
(arXiv 2304.05884). `mlcd` with one label is RICE's object loss (arXiv 2507.20025), of whole images.

The positive term of `mlcd` vanishes at a cosine of about 0.4 and its negative term hardly falls,
so the loss stays large while the features get better; both are logged apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import LocalPath, OnlyWhere, PositiveInt, RecipeConfig
from trainer.data.classes import class_labels
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.hashing import hash_bits, key_of
from trainer.kernels.autotune import KernelSizes
from trainer.kernels.one_pass import fits_one_pass
from trainer.losses.learned_prototypes import ActiveRows, negative_figures, prototype_statistics
from trainer.losses.margin import Margin, MarginKind, coordinate_subset
from trainer.losses.multilabel import LossKind, MultilabelLoss, multilabel_loss
from trainer.losses.one_pass import one_pass_multilabel_loss
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses

LARGEST_ONE_PASS_SCALE = 80.0
LOOKED_UP = 10_000
"""Samples of the shards whose labels are looked up before a run starts."""


class Config(RecipeConfig):
    """Defaults are MLCD's. Where the model has a head, its output is compared."""

    name: Literal["mlcd"] = "mlcd"
    model: ImageTowerConfig = ImageTowerConfig()
    reads = frozenset({"head"})
    labels: LocalPath | None = None
    """Folder of cluster labels by sample id, the nearest first."""
    classes: tuple[str, ...] = ()
    """Instead of `labels`: json keys of the shards. Every value of each is a class."""
    num_prototypes: PositiveInt | None = None
    """Rows of the head; one for each label that occurs where None."""
    labels_per_sample: PositiveInt | None = None
    """At most; 8 where None, and 1 for `pfc_ce`."""
    label_choice: Literal["nearest", "random"] = "nearest"
    """Which of a sample's labels; `random` draws again in every step."""
    loss: LossKind = "mlcd"
    scale: float = Field(default=64.0, gt=0)
    """Of cosines."""
    margin: MarginKind = "cosine"
    margin_size: float = 0.3
    """A cosine, or an angle in radians."""
    ceiling: float | None = None
    """The inter-class filter: negatives of a higher cosine count as a logit of zero."""
    features_kept: PositiveInt | None = None
    """Coordinates that a step compares, drawn anew for each; all where None."""
    drop_unlabelled: Annotated[bool, OnlyWhere("loss", "mlcd")] = False
    """Leave samples without a label out of `mlcd`'s negative term too."""
    kernel_sizes: KernelSizes = "fixed"
    """Of the programs on a GPU: `fixed` gives every run the same bits; `timed` tries a few in the
    first step and keeps the fastest. Nothing to choose without a GPU."""
    figures_every: PositiveInt = 10
    """Steps between two readings of the negatives' mean cosine and the head's figures, which cost
    an exchange of the features; `log_every` shows them if it is a multiple."""
    head: PrototypeHeadConfig = PrototypeHeadConfig()

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> Config:
        if (self.labels is None) == (not self.classes):
            raise ValueError("give either `labels`, a folder, or `classes`, json keys")
        if self.loss == "pfc_ce" and self.wanted != 1:
            raise ValueError("pfc_ce takes labels_per_sample=1; `slots` takes several")
        if self.classes and (self.labels_per_sample or 0) > len(self.classes):
            raise ValueError(
                f"labels_per_sample is {self.labels_per_sample}, but {len(self.classes)} keys of "
                "`classes` give one label each; ask for fewer"
            )
        return self

    @property
    def wanted(self) -> int:
        """Labels of a sample at most."""
        return self.labels_per_sample or (1 if self.loss == "pfc_ce" else 8)

    @property
    def dim(self) -> int:
        """Of what is compared."""
        return self.model.head.dim if self.model.head else self.model.embed_dim


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> ImageTower:
    return build_image_tower(config.model, comm, seed=seed)


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context = config, context
        self.labels = _labels(config, context)
        self.model = build_model(config, context.text_tokenizer, context.comm, seed=context.seed)
        self.head = PrototypeHead(
            config.head,
            num_prototypes=config.num_prototypes or self.labels.num_clusters,
            dim=config.dim,
            comm=context.comm,
            seed=context.seed,
        )
        self.parts: dict[str, Part] = {"head": self.head}
        # The same on all ranks: the two forms exchange different things.
        rows_per_rank = -(-self.head.num_prototypes // self.head.comm.world_size)
        negatives = round(rows_per_rank * config.head.sample_rate)
        fits = fits_one_pass(negatives, config.features_kept or config.dim, 4)
        self._in_one_pass = fits and config.scale <= LARGEST_ONE_PASS_SCALE

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """One loss over the batch of all ranks; its terms and figures, which have no weight."""
        rows = features.image if features.image_projected is None else features.image_projected
        assert rows is not None
        labels = self._chosen(batch.sample_id, step)
        rows, active = self._subspace(rows, self.head.active(labels, step), step)
        result = self._loss(rows, labels, active)
        figures = {**result.figures, "labelled": (labels >= 0).any(dim=1).float().mean()}
        if (step + 1) % self.config.figures_every == 0:
            figures |= negative_figures(rows, labels, active, self.head.comm)
            figures |= self.head.figures()
        losses = Losses.of(**{self.config.loss: result.loss})
        for name, value in figures.items():
            losses = losses.with_term(name, value, 0.0)
        return losses

    def _chosen(self, sample_id: Tensor, step: int) -> Tensor:
        """[batch, labels]: the nearest clusters of each sample, or drawn ones of all it has."""
        table = self.labels.top(sample_id)
        if self.config.label_choice == "random":
            columns = torch.arange(table.shape[1], device=table.device)
            key = key_of(self.context.seed, "labels", step)
            bits = hash_bits(sample_id[:, None] ^ hash_bits(columns, key), key)
            last = torch.iinfo(bits.dtype).max
            order = bits.masked_fill(table < 0, last).argsort(dim=1, stable=True)
            table = table.gather(1, order)
        return table[:, : self.config.wanted].contiguous()

    def _subspace(self, rows: Tensor, active: ActiveRows, step: int) -> tuple[Tensor, ActiveRows]:
        """Features and prototypes cut to the coordinates of this step, the same on all ranks."""
        if self.config.features_kept is None:
            return rows, active
        key = key_of(self.context.seed, "coordinates", step)
        kept = coordinate_subset(self.config.dim, self.config.features_kept, key).to(rows.device)
        return rows[:, kept], active._replace(rows=active.rows[:, kept])

    def _loss(self, rows: Tensor, labels: Tensor, active: ActiveRows) -> MultilabelLoss:
        config, comm = self.config, self.head.comm
        options: dict[str, Any] = {
            "kind": config.loss,
            "margin": Margin(config.margin, config.margin_size),
            "drop_unlabelled": config.drop_unlabelled,
            "scale": config.scale,
        }
        exchange: dict[str, Any] = {
            "ceiling": config.ceiling,
            "gather_dtype": self.head.gather_dtype,
        }
        if rows.device.type == "cpu" and self._in_one_pass:
            return one_pass_multilabel_loss(rows, labels, active, comm, **options, **exchange)
        statistics = prototype_statistics(
            *(rows, labels, active, comm),
            scale=config.scale,
            kernel_sizes=config.kernel_sizes,
            **exchange,
        )
        return multilabel_loss(statistics, **options)


def _labels(config: Config, context: Context) -> ClusterLabels:
    if config.labels is None:
        return _classes(config.classes, context)
    labels = ClusterLabels.open(config.labels)
    if config.labels_per_sample and labels.per_sample < config.wanted:
        raise ConfigError(
            f"recipe.labels_per_sample is {config.wanted}, but {config.labels} has "
            f"{labels.per_sample} a sample; ask for fewer or make more"
        )
    _check_join(labels, config.labels, context)
    return labels


def _classes(keys: tuple[str, ...], context: Context) -> ClusterLabels:
    """A column for each key, its classes numbered behind those of the keys before."""
    spec, comm = context.data.train, context.comm
    found = [class_labels(spec, key, comm) for key in keys]
    for key, each in zip(keys, found, strict=True):
        if not len(each):
            raise ConfigError(f"no sample of {spec} has the json key {key!r} of recipe.classes")
    ids = torch.cat([each.ids for each in found]).unique()
    columns, count = [], 0
    for each in found:
        own = each.of(ids)
        columns.append(torch.where(own >= 0, own + count, -1))
        count += each.num_clusters
    table = torch.stack(columns, dim=1)
    order = (table < 0).int().argsort(dim=1, stable=True)
    return ClusterLabels(ids, table.gather(1, order))


def _check_join(labels: ClusterLabels, folder: Path, context: Context) -> None:
    """DataError where no sample has a label: most likely they are of other shards."""
    if context.data.reader != "indexed":
        return
    ids = torch.as_tensor(ShardSet.open(context.data.train).ids)
    some = ids[:: max(1, len(ids) // LOOKED_UP)]
    if not bool((labels.of(some) >= 0).any()):
        raise DataError(
            f"none of {len(some)} samples of {context.data.train} has a label in {folder}; labels "
            "are found by sample id (shard name and key), so they must be made from these shards"
        )
