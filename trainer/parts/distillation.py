"""A frozen pair as a term of any recipe with two towers: who matches whom, as the teacher sees it.

Either its vectors were computed once and are read from two stores, of the plain picture and of one
text a sample, whatever view the student is given. Or the pair runs beside the student, without
gradient, on the student's own views and tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from trainer.comm import Comm, agreed
from trainer.config import CaptionConfig, Frozen, LocalPath, OnlyWith, PositiveInt
from trainer.errors import ConfigError
from trainer.losses.distill import SoftDistillation, soft_distillation
from trainer.models.config import TwoTowerConfig
from trainer.models.load import model_pixels
from trainer.parts.teacher_digests import TeacherDigests, store_digest
from trainer.recipe import Context, Part
from trainer.store import EmbeddingStore
from trainer.types import Batch, Features, Losses

_STATES = ("mean", "cls", "last")
"""Poolings that end before a pair's own map into its joint space."""
_USUAL_SCALE = 100.0
"""Of trained CLIP models."""


class DistillConfig(Frozen):
    """A frozen pair of towers whose similarities the student learns besides its own task: two
    stores of its vectors, or the pair itself."""

    image_store: LocalPath | None = None
    """What the teacher says of the images; made by `tools/embed.py`, one vector a sample."""
    text_store: LocalPath | None = None
    """What it says of the texts, in the same space."""
    model: LocalPath | None = None
    """Instead of stores: a folder with a pair that transformers saved, and its image processor. It
    sees the student's views and reads the student's tokens."""
    precision: Annotated[Literal["float32", "float16", "bfloat16"], OnlyWith("model")] = "float32"
    """Of the weights and products of the pair at `model`."""
    sharded: Annotated[bool, OnlyWith("model")] = False
    """Deal the pair's weights to all ranks (ZeRO-3); a block is gathered when it runs."""
    rows_at_once: Annotated[PositiveInt | None, OnlyWith("model")] = None
    """Samples of one pass of the pair at `model`; all that a rank has of a step where None."""
    logit_scale: float | None = Field(default=None, gt=0)
    """The teacher's multiplier of cosines. Where None, that of the pair at `model`, or 100 with
    stores: that of trained CLIP models."""
    weight: float = Field(default=1.0, gt=0)
    """Of the term; 1 as in open_clip and TinyCLIP."""

    @model_validator(mode="after")
    def _one_teacher(self) -> DistillConfig:
        stores = (self.image_store, self.text_store)
        if (self.model is None) != all(stores) or (self.model is not None and any(stores)):
            raise ValueError("give either `image_store` and `text_store`, or `model`")
        return self

    def join(self) -> TeacherPair | None:
        """What data workers read: nothing where the pair itself is there."""
        if self.image_store is None or self.text_store is None:
            return None
        return TeacherPair(self.image_store, self.text_store)


class Distils(Frozen):
    """Of a recipe with two towers that may learn from a frozen pair. Stands before `RecipeConfig`
    among the bases of a `Config`, because it knows better what data workers read."""

    distill: DistillConfig | None = None
    """A frozen teacher, from two embedding stores or by itself; none where None."""

    def join(self, seed: int) -> TeacherPair | None:
        return None if self.distill is None else self.distill.join()


class TeacherPair:
    """The teacher's two unit vectors of every sample, the image's first.

    It travels to the data workers, which read while the model computes; each opens the stores.
    """

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self.stores: list[EmbeddingStore] | None = None

    def __call__(
        self, sample_id: Int64[Tensor, " batch"], epoch: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch 2 dim"]:
        self.stores = self.stores or [EmbeddingStore.open(folder) for folder in self.folders]
        # Half precision or int8 on disk: lengths are one only to that precision.
        return normalize(torch.stack([store.rows(sample_id) for store in self.stores], 1), dim=-1)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "stores": None}


@runtime_checkable
class Teacher(Protocol):
    """Who says how well images and texts of a batch match."""

    scale: float
    """Multiplies the cosines."""

    def vectors(
        self, batch: Batch
    ) -> tuple[Float32[Tensor, "batch dim"], Float32[Tensor, "batch dim"]]:
        """Unit vectors of this rank's images, and of its texts."""
        ...


class StoredTeacher(TeacherDigests):
    """What `TeacherPair` has read; a run does not go on with other stores."""

    def __init__(self, config: DistillConfig, captions: CaptionConfig, comm: Comm) -> None:
        """ConfigError where the stores are no pair, or of other texts than the student reads."""
        stores = _stores(config)
        for store in stores.values():
            if store.num_vectors != 1:
                raise ConfigError(
                    f"recipe.distill: {store.folder} has {store.num_vectors} vectors a sample; a "
                    "teacher's similarities are of one vector each"
                )
        _refuse_no_pair(stores["image"], stores["text"])
        _refuse_other_texts(stores["text"], captions)
        super().__init__({name: store_digest(store) for name, store in stores.items()}, comm)
        self.scale = config.logit_scale or _USUAL_SCALE

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.texts is not None
        return batch.texts[:, 0], batch.texts[:, 1]


class LiveTeacher(TeacherDigests):
    """The pair itself, whole on every rank or dealt to them; a run does not go on with another."""

    def __init__(self, config: DistillConfig, model: TwoTowerConfig, context: Context) -> None:
        """ConfigError where the folder holds no pair that reads the student's rows."""
        # Imported where it is wanted, with all that runs teachers.
        from trainer.teachers.pair import as_seen_by, load_live_pair

        assert config.model is not None
        folder, tokenizer, comm = config.model, context.tokenizer, context.comm
        found = agreed(
            comm,
            lambda: load_live_pair(
                folder, tokenizer, length=model.text_length, precision=config.precision
            ),
        )
        scale = config.logit_scale or found.scale
        if scale is None:
            raise ConfigError(f"{folder} says no logit scale; set recipe.distill.logit_scale")
        super().__init__({"model": found.digest}, comm)
        self.scale, self.note = scale, found.note
        self._seen = partial(as_seen_by, found.pixels, model_pixels(model))
        self._rows_at_once = config.rows_at_once
        if config.sharded:
            from trainer.engine.frozen import (
                FrozenEngine,
            )  # deepspeed is imported where it is wanted

            self._run = FrozenEngine(found.model, comm).together
        else:
            self._run = found.model.to(comm.device)

    @torch.no_grad()
    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.images is not None
        assert batch.tokens is not None
        assert batch.token_mask is not None
        size = self._rows_at_once or len(batch.images)
        parts = [
            self._run(pixels=self._seen(images), tokens=tokens, mask=mask)
            for images, tokens, mask in zip(
                *(rows.split(size) for rows in (batch.images, batch.tokens, batch.token_mask)),
                strict=True,
            )
        ]
        images, texts = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(texts)


class Distillation:
    """The term of a recipe that may have a teacher; `parts` are what the recipe has to name."""

    def __init__(self, config: Distils, model: TwoTowerConfig, context: Context) -> None:
        self._config, self._comm = config.distill, context.comm
        self.parts: dict[str, Part] = {}
        if config.distill is not None:
            self._teacher = teacher_of(config.distill, model, context)
            self.parts["teacher"] = self._teacher

    def losses(self, features: Features, batch: Batch) -> Losses:
        """`distill` and `distill_divergence`, of the images' first view; nothing without a
        teacher."""
        if self._config is None:
            return Losses()
        found = distillation(self._teacher, features, batch, self._comm)
        return with_distillation(Losses(), found, self._config)


def teacher_of(
    config: DistillConfig, model: TwoTowerConfig, context: Context
) -> StoredTeacher | LiveTeacher:
    """The part that says what the teacher says, for a student of `model`."""
    if config.model is None:
        return StoredTeacher(config, context.data.captions, context.comm)
    return LiveTeacher(config, model, context)


def distillation(
    teacher: Teacher, features: Features, batch: Batch, comm: Comm
) -> SoftDistillation:
    """The term, unweighted, of a batch that the student has seen."""
    image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
    return soft_distillation(image, text, scale, *teacher.vectors(batch), teacher.scale, comm)


def with_distillation(losses: Losses, found: SoftDistillation, config: DistillConfig) -> Losses:
    """The term `distill`, and beside it how far it is above its least value."""
    losses = losses.with_term("distill", found.loss, config.weight)
    return losses.with_term("distill_divergence", found.divergence.detach(), 0.0)


def _stores(config: DistillConfig) -> dict[str, EmbeddingStore]:
    assert config.image_store is not None
    assert config.text_store is not None
    return {
        "image": EmbeddingStore.open(config.image_store),
        "text": EmbeddingStore.open(config.text_store),
    }


def _refuse_no_pair(image: EmbeddingStore, text: EmbeddingStore) -> None:
    if image.identity.reads != "image" and text.identity.reads == "image":
        raise ConfigError(
            f"recipe.distill: {image.folder} was made of {image.identity.reads} and {text.folder} "
            "of images; exchange image_store and text_store"
        )
    if image.dim != text.dim:
        raise ConfigError(
            f"recipe.distill: {image.folder} holds vectors of {image.dim} numbers and "
            f"{text.folder} of {text.dim}; both must be of the teacher's joint space"
        )
    if image.identity.model != text.identity.model:
        raise ConfigError(
            f"recipe.distill: {image.folder} ({image.identity.teacher}) and {text.folder} "
            f"({text.identity.teacher}) are of two models, whose vectors can't be compared; make "
            "both of one pair of towers"
        )
    for store in (image, text):
        if store.identity.pooling.startswith(_STATES):
            raise ConfigError(
                f"recipe.distill: {store.folder} holds pooled states ({store.identity.pooling}), "
                "which lie in no joint space; make it with pooling=projected"
            )


def _refuse_other_texts(text: EmbeddingStore, captions: CaptionConfig) -> None:
    """A store has one text a sample, so the student must read that one. What imported vectors were
    made of is not known."""
    weights = captions.weights or (1.0,) * len(captions.fields)
    read = [name for name, weight in zip(captions.fields, weights, strict=True) if weight]
    imported = text.identity.model == "imported"
    if len(read) > 1 or (text.identity.reads != read[0] and not imported):
        raise ConfigError(
            f"recipe.distill: {text.folder} was made of {text.identity.reads}, and "
            f"data.captions.fields are {', '.join(read)}; the student must read the one text that "
            "the teacher has read"
        )
