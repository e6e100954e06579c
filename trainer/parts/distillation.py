"""A frozen pair's vectors as a term of any recipe with two towers: read from two stores, compared.

Stores hold what the teacher says of the plain picture and of one text a sample; the student sees
an augmented view of the same picture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from trainer.comm import Comm
from trainer.config import CaptionConfig, Frozen, LocalPath
from trainer.errors import ConfigError
from trainer.losses.distill import soft_distillation
from trainer.parts.teacher_digests import TeacherDigests, store_digest
from trainer.store import EmbeddingStore
from trainer.types import Batch, Features

_STATES = ("mean", "cls", "last")
"""Poolings that end before a pair's own map into its joint space."""


class DistillConfig(Frozen):
    """A frozen pair of towers whose similarities the student learns besides its own task."""

    image_store: LocalPath
    """What the teacher says of the images; made by `tools/embed.py`, one vector a sample."""
    text_store: LocalPath
    """What it says of the texts, in the same space."""
    logit_scale: float = Field(default=100.0, gt=0)
    """The teacher's multiplier of cosines; 100 is that of trained CLIP models."""
    weight: float = Field(default=1.0, gt=0)
    """Of the term; 1 as in open_clip."""

    def join(self) -> TeacherPair:
        return TeacherPair(self.image_store, self.text_store)


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


def distillation(config: DistillConfig, features: Features, batch: Batch, comm: Comm) -> Tensor:
    """The term, unweighted, of a batch whose `texts` `TeacherPair` has read."""
    assert features.image is not None
    assert features.text is not None
    assert features.logit_scale is not None
    assert batch.texts is not None
    teacher_image, teacher_text = batch.texts.unbind(dim=1)
    return soft_distillation(
        features.image,
        features.text,
        features.logit_scale,
        teacher_image,
        teacher_text,
        config.logit_scale,
        comm,
    )


def teacher_part(config: DistillConfig, captions: CaptionConfig, comm: Comm) -> TeacherDigests:
    """The part that keeps a run from going on with other vectors; a ConfigError where the stores
    are no pair, or are of other texts than the student reads."""
    stores = {
        "image": EmbeddingStore.open(config.image_store),
        "text": EmbeddingStore.open(config.text_store),
    }
    for store in stores.values():
        if store.num_vectors != 1:
            raise ConfigError(
                f"recipe.distill: {store.folder} has {store.num_vectors} vectors a sample; a "
                "teacher's similarities are of one vector each"
            )
    _refuse_no_pair(stores["image"], stores["text"])
    _refuse_other_texts(stores["text"], captions)
    return TeacherDigests({name: store_digest(store) for name, store in stores.items()}, comm)


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
