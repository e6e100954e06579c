"""Sharded learnable prototypes as a term of any recipe with an image tower.

A sample belongs to several clusters, found beforehand by another model, or to classes that its
shard names; image features are compared with a learnable row for each, sharded over the ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer.config import Frozen, LocalPath, OnlyWhere, PositiveInt
from trainer.data.classes import class_labels
from trainer.data.labels import ClusterLabels
from trainer.data.noise import trained_on
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.hashing import hash_bits, key_of
from trainer.kernels.autotune import KernelSizes
from trainer.kernels.way import Way
from trainer.losses.learned_prototypes import (
    ActiveRows,
    LogitOptions,
    gathered_units,
    negative_figures,
)
from trainer.losses.margin import Margin, MarginKind, coordinate_subset
from trainer.losses.multilabel import LossKind, MultilabelLoss, MultilabelOptions
from trainer.losses.prototype_loss import prototype_loss, slots_loss
from trainer.losses.units import lean_unit_rows
from trainer.losses.usage import prototype_overuse
from trainer.parts.overuse import OveruseConfig
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig
from trainer.parts.sampling import rate_with_negatives
from trainer.recipe import Context
from trainer.types import Batch, Features, Losses

LOOKED_UP = 10_000
"""Samples of the shards whose labels are looked up before a run starts."""


class PrototypesConfig(Frozen):
    """Labels of images, and the loss that compares features with a row for each."""

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
    negatives: Annotated[Literal["shared", "each"], OnlyWhere("loss", "slots")] = "shared"
    """`each`: every label of a sample has a draw of its own, which may hold the sample's other
    labels, and by default all that other samples have there, as in the published head; it costs as
    much as that many losses. `shared`: one draw, without any of a sample's labels."""
    loss: LossKind = "mlcd"
    """`mlcd` and `mlc` take all of a sample's labels at once, `slots` each in a softmax of its own,
    `pfc_ce` one label (arXiv 2407.17331)."""
    scale: float = Field(default=64.0, gt=0)
    """Of cosines."""
    margin: MarginKind = "cosine"
    """How the positive is made harder: `cosine` takes `margin_size` off its cosine, `angular` adds
    it to its angle, `straight_through` has the value of `angular` and a derivative of one."""
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
    kept_gib: float = Field(default=8.0, ge=0)
    """GiB that probabilities, in bfloat16, may take on a GPU between the forward and the backward
    pass: 2 bytes for each pair of a sample of the global batch and a rank's row of the step. With
    fewer GiB than that (0: always) they are computed again, a third more work. No effect without a
    GPU, nor for a scale above 80."""
    figures_every: PositiveInt = 10
    """Steps between two readings of the negatives' mean cosine and the head's figures, which cost
    an exchange of the features; `log_every` shows them if it is a multiple."""
    head: PrototypeHeadConfig = PrototypeHeadConfig()

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> PrototypesConfig:
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

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> PrototypesConfig:
        if self.loss != "mlcd" and self.head.sample_rate == 0 and not self._unites:
            raise ValueError(
                f"head.sample_rate 0 leaves no negative, and {self.loss} is then always zero; "
                "give a share, or set head.union_positives"
            )
        return self

    @property
    def _unites(self) -> bool:
        said = self.head.union_positives
        alone = self.loss == "pfc_ce" or self.negatives == "each"
        return alone if said is None else said

    @property
    def wanted(self) -> int:
        """Labels of a sample at most."""
        return self.labels_per_sample or (1 if self.loss == "pfc_ce" else 8)

    def head_of(self, num_rows: int) -> PrototypeHeadConfig:
        """The head's configuration with what depends on the loss and on the table's size."""
        head = self.head
        labels = min(self.wanted, len(self.classes) or self.wanted)
        labels = 1 if self.negatives == "each" else labels
        rate = rate_with_negatives(
            head.sample_rate, num_rows, labels=labels, sampling=head.sampling
        )
        return head.model_copy(update={"sample_rate": rate, "union_positives": self._unites})


class WeightedPrototypesConfig(PrototypesConfig):
    """Prototypes beside another task."""

    weight: float = Field(default=1.0, ge=0)
    """Of the loss; with 0 it is computed and logged, and moves nothing."""


class PrototypesTerm:
    """Labels, and the head that the loss learns; `head` is the part that a recipe has to name."""

    def __init__(self, config: PrototypesConfig, context: Context, *, dim: int) -> None:
        self.config, self.context, self.dim = config, context, dim
        self.weight = config.weight if isinstance(config, WeightedPrototypesConfig) else 1.0
        self.overuse: OveruseConfig | None = None
        self.labels = _labels(config, context)
        self._looked_up = self.labels.beside(context.comm.device)
        self.head = _head(config, config.num_prototypes or self.labels.num_clusters, context, dim)
        rows_per_rank = -(-self.head.num_prototypes // self.head.comm.world_size)
        self._usual_negatives = round(rows_per_rank * self.head.config.sample_rate)
        self._options = MultilabelOptions(
            kind=config.loss,
            margin=Margin(config.margin, config.margin_size),
            drop_unlabelled=config.drop_unlabelled,
            logits=LogitOptions(
                scale=config.scale,
                ceiling=config.ceiling,
                gather_dtype=self.head.gather_dtype,
                way=Way(kernel_sizes=config.kernel_sizes, kept_gib=config.kept_gib),
            ),
        )

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """One loss over the batch of all ranks; its terms and figures, which have no weight."""
        rows = compared_rows(features)
        labels = self._chosen(batch.sample_id, step)
        each = self.config.negatives == "each"
        chosen = self.head.active_each(labels, step) if each else [self.head.active(labels, step)]
        rows, chosen = self._subspace(rows, chosen, step)
        result, more = self._compared(rows, labels, chosen, step)
        figures = {**result.figures, "labelled": (labels >= 0).any(dim=1).float().mean(), **more}
        losses = Losses().with_term(self.config.loss, result.loss, self.weight)
        if self.overuse is not None:
            value = self._overused(rows, chosen[0])
            losses = losses.with_term("overuse", value, self.overuse.weight_at(step))
        for name, value in figures.items():
            losses = losses.with_term(name, value, 0.0)
        return losses

    def _compared(
        self, rows: Tensor, labels: Tensor, chosen: list[ActiveRows], step: int
    ) -> tuple[MultilabelLoss, dict[str, Tensor]]:
        """The loss, and the figures that are not due in every step."""
        each, comm = self.config.negatives == "each", self.head.comm
        usual, options = self._usual_negatives, self._options
        if each:
            result = slots_loss(rows, labels, chosen, comm, options, usual_negatives=usual)
        else:
            result = prototype_loss(rows, labels, chosen[0], comm, options, usual_negatives=usual)
        if (step + 1) % self.config.figures_every:
            return result, {}
        columns = labels.split(1, dim=1) if each else [labels]
        seen = [
            negative_figures(rows, column, active, comm)["negative_cosine"]
            for column, active in zip(columns, chosen, strict=True)
        ]
        return result, {"negative_cosine": torch.stack(seen).mean(), **self.head.figures()}

    def _overused(self, rows: Tensor, active: ActiveRows) -> Tensor:
        """Of the rows that the step compares with, without margins."""
        everyones = gathered_units(rows, self.head.comm, gather_dtype=self.head.gather_dtype)
        directions = lean_unit_rows(active.rows.to(everyones.dtype))
        scale = everyones.new_tensor(self.config.scale)
        return prototype_overuse(everyones, directions, scale, self.head.comm)

    def _chosen(self, sample_id: Tensor, step: int) -> Tensor:
        """[batch, labels]: the nearest clusters of each sample, or drawn ones of all it has."""
        table = self._looked_up.top(sample_id)
        if self.config.label_choice == "random":
            columns = torch.arange(table.shape[1], device=table.device)
            key = key_of(self.context.seed, "labels", step)
            bits = hash_bits(sample_id[:, None] ^ hash_bits(columns, key), key)
            last = torch.iinfo(bits.dtype).max
            order = bits.masked_fill(table < 0, last).argsort(dim=1, stable=True)
            table = table.gather(1, order)
        return table[:, : self.config.wanted].contiguous()

    def _subspace(
        self, rows: Tensor, chosen: list[ActiveRows], step: int
    ) -> tuple[Tensor, list[ActiveRows]]:
        """Features and prototypes cut to the coordinates of this step, the same on all ranks."""
        if self.config.features_kept is None:
            return rows, chosen
        key = key_of(self.context.seed, "coordinates", step)
        kept = coordinate_subset(self.dim, self.config.features_kept, key)
        kept = kept.to(rows.device, non_blocking=True)
        return rows[:, kept], [active._replace(rows=active.rows[:, kept]) for active in chosen]


def compared_rows(features: Features) -> Tensor:
    """[batch, dim]: what is compared with prototypes, the head's output where there is one."""
    rows = features.image if features.image_projected is None else features.image_projected
    assert rows is not None
    return rows


def _head(config: PrototypesConfig, num_rows: int, context: Context, dim: int) -> PrototypeHead:
    if num_rows < 2:
        raise ConfigError(
            f"{num_rows} prototype gives images nothing to be told apart from; give labels or "
            "classes with at least two values"
        )
    options, asked = config.head_of(num_rows), config.head.sample_rate
    head = PrototypeHead(
        options, num_prototypes=num_rows, dim=dim, comm=context.comm, seed=context.seed
    )
    if options.sample_rate != asked:
        head.note = (
            f"head.sample_rate {asked:g} of {num_rows} prototypes leaves steps without a negative; "
            f"{options.sample_rate:.3g} is taken"
        )
    return head


def _labels(config: PrototypesConfig, context: Context) -> ClusterLabels:
    if config.labels is None:
        return class_columns(config.classes, context)
    labels = ClusterLabels.open(config.labels)
    if config.labels_per_sample and labels.per_sample < config.wanted:
        raise ConfigError(
            f"labels_per_sample is {config.wanted}, but {config.labels} has "
            f"{labels.per_sample} a sample; ask for fewer or make more"
        )
    check_join(labels, config.labels, context)
    return labels


def class_columns(keys: tuple[str, ...], context: Context) -> ClusterLabels:
    """A column for each key, its classes numbered behind those of the keys before; with the noise
    that the run asks for (`data.noise`)."""
    spec, comm = context.data.train, context.comm
    budget = context.data.bad_sample_budget
    shards = trained_on(context.data)
    found = [class_labels(shards, key, comm, budget=budget) for key in keys]
    for key, each in zip(keys, found, strict=True):
        if not len(each):
            raise ConfigError(f"no sample of {spec} has the json key {key!r} of `classes`")
    ids = torch.cat([each.ids for each in found]).unique()
    columns, count = [], 0
    for each in found:
        own = each.of(ids)
        columns.append(torch.where(own >= 0, own + count, -1))
        count += each.num_clusters
    table = torch.stack(columns, dim=1)
    order = (table < 0).int().argsort(dim=1, stable=True)
    return ClusterLabels(ids, table.gather(1, order))


def check_join(labels: ClusterLabels, folder: Path, context: Context) -> None:
    """DataError where no sample has a label: most likely they are of other shards."""
    if context.data.reader != "indexed":
        return
    shards = ShardSet.open(context.data.train)
    some = torch.tensor([shards.name_of(row)[2] for row in shards.some(LOOKED_UP).tolist()])
    if not bool((labels.of(some) >= 0).any()):
        raise DataError(
            f"none of {len(some)} samples of {context.data.train} has a label in {folder}; labels "
            "are found by sample id (names of set, shard and key), so they must be made of these"
        )
