"""Several prototypes for each class, moved by momentum; no gradient, no optimizer (PALM).

A rank owns a range of classes with all their prototypes. The table that a loss has moved is held
back until the step is known to be applied. Its state is rows of the whole table, so a run goes on
with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from trainer.comm import Comm
from trainer.config import Frozen, LocalPath, OnlyWhere, PositiveInt
from trainer.data.labels import ClusterLabels
from trainer.errors import CheckpointError, ConfigError
from trainer.losses.palm import ClassPrototypes, PalmOptions, PalmResult, Parity, palm_terms
from trainer.parts.initial_rows import normal_rows
from trainer.parts.prototypes import check_join, class_columns
from trainer.parts.row_ranges import fill_rows, row_pieces
from trainer.recipe import Context

Temperature = Annotated[float, Field(ge=0.02)]


class PalmPrototypesConfig(Frozen):
    """Labels of images, the prototypes of a class, and how both terms compare."""

    parity: Parity = "paper"
    """What holds where the published code differs from the paper."""
    labels: LocalPath | None = None
    """Folder of cluster labels by sample id; a sample is of its nearest cluster."""
    classes: str | None = None
    """Instead of `labels`: a json key of the shards, whose every value is a class."""
    unlabelled: PositiveInt | None = None
    """Instead of `labels` and `classes`: so many prototypes of no class. A view is compared with
    what another view of its image was assigned."""
    prototypes_per_class: Annotated[PositiveInt, OnlyWhere("unlabelled", None)] = 6
    """Of each class."""
    kept: PositiveInt = 5
    """Prototypes of its class, at most, that a sample is assigned to."""
    momentum: float = Field(default=0.999, ge=0, le=1)
    """What a prototype keeps of itself in a step; with 1 none moves."""
    temperature: Temperature = 0.1
    """Cosines of features and prototypes are divided by it."""
    epsilon: Temperature = 0.05
    """Cosines are divided by it in the assignment; a small one makes it hard."""
    iterations: PositiveInt = 3
    """Rounds of the assignment."""
    contrast_weight: float = Field(default=1.0, ge=0)
    """Of the contrast among prototypes. Its gradient has a factor of 1 - momentum."""
    contrast_temperature: Temperature | None = None
    """Cosines of two prototypes are divided by it; `temperature` where None, and 0.5 for `code`."""

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> PalmPrototypesConfig:
        given = [self.labels, self.classes, self.unlabelled]
        if sum(source is not None for source in given) != 1:
            raise ValueError(
                "give either `labels`, a folder, or `classes`, a json key, or `unlabelled`, a "
                "number of prototypes"
            )
        if self.unlabelled is not None and (self.contrast_weight or self.parity == "paper"):
            raise ValueError(
                "without classes there is none to be apart from, and the paper's likelihood of the "
                "only one is 1: give contrast_weight: 0 and parity: code"
            )
        if self.prototypes_per_class == 1 and self.contrast_weight:
            raise ValueError(
                "one prototype a class has no other to be near to; give contrast_weight=0, or "
                "prototypes_per_class of 2 or more"
            )
        return self

    @property
    def count(self) -> int:
        """Prototypes of a class, or of all images."""
        return self.unlabelled or self.prototypes_per_class

    def options(self, *, views: int = 1) -> PalmOptions:
        """As the losses want it."""
        usual = 0.5 if self.parity == "code" else self.temperature
        return PalmOptions(
            parity=self.parity,
            momentum=self.momentum,
            kept=self.kept,
            temperature=self.temperature,
            contrast_temperature=self.contrast_temperature or usual,
            epsilon=self.epsilon,
            iterations=self.iterations,
            exchanged_views=1 if self.unlabelled is None else views,
        )


class PalmPrototypes:
    """This rank's classes of a table of `num_classes`; a Part."""

    def __init__(
        self,
        config: PalmPrototypesConfig,
        *,
        num_classes: int,
        dim: int,
        comm: Comm,
        seed: int,
        views: int = 1,
    ) -> None:
        if num_classes < 2 and config.unlabelled is None:
            raise ConfigError(
                f"{num_classes} class gives images nothing to be told apart from; give labels or "
                "classes with at least two values"
            )
        self.num_classes, self.comm = num_classes, comm
        self.options = config.options(views=views)
        self._first, last = comm.row_range(num_classes)
        self._count = config.count
        ends = self._first * self._count, last * self._count
        rows = normalize(normal_rows(*ends, dim, deviation=1.0, seed=seed), dim=1)
        self.rows = rows.view(-1, self._count, dim).to(comm.device)
        self._moved: Tensor | None = None

    def terms(
        self, features: Float[Tensor, "rows dim"], labels: Int64[Tensor, " rows"]
    ) -> PalmResult:
        """Both terms; with gradients, the table that they have moved waits for `after_step`."""
        table = ClassPrototypes(self.rows, self._first, self.num_classes)
        result = palm_terms(features, labels, table, self.comm, self.options)
        if torch.is_grad_enabled():
            self._moved = result.moved
        return result

    def gradients_finite(self) -> None:
        return None

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        if applied and self._moved is not None:
            self.rows.copy_(self._moved)
        self._moved = None

    def state_share(self) -> Iterator[tuple[str, Tensor]]:
        yield from row_pieces(self._fields(), first=self._first * self._count)
        if self.comm.is_main:
            yield "shape", self._shape()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found, own = state["shape"].tolist(), self._shape().tolist()
        if found != own:
            raise CheckpointError(
                f"the checkpoint's table has {found[0]} classes of {found[1]} prototypes of "
                f"{found[2]} numbers, this one {own[0]} of {own[1]} of {own[2]}"
            )
        fill_rows(self._fields(), state, first=self._first * self._count)

    def _fields(self) -> dict[str, Tensor]:
        return {"rows": self.rows.view(-1, self.rows.shape[2])}

    def _shape(self) -> Tensor:
        return torch.tensor([self.num_classes, *self.rows.shape[1:]])


def palm_labels(config: PalmPrototypesConfig, context: Context) -> ClusterLabels | None:
    """One class for every sample that has one; None where no class is asked for. DataError where
    the folder is of other samples."""
    if config.unlabelled is not None:
        return None
    if config.labels is None:
        assert config.classes is not None
        return class_columns((config.classes,), context)
    labels = ClusterLabels.open(config.labels)
    check_join(labels, config.labels, context)
    return labels
