"""FLAME: images learn to match several texts that a frozen language model has read (2411.11927).

What the language model says of a caption (the caption as it is, and what stands behind prompts
about its categories, action, mood) was computed once by `tools/embed.py`. A visit of an image
draws some of these vectors, which the data workers read; the language model itself is neither in
memory nor in checkpoints.

Beyond the original: facets are drawn by hash of seed, epoch and sample id; images travel between
ranks instead of texts; no parameter is unused; the vectors' store is verified when a run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import LocalPath, OnlyWhere, PositiveInt, RecipeConfig
from trainer.errors import ConfigError
from trainer.hashing import hash_bits, key_of
from trainer.losses.multi_positive import multi_positive_nce, multi_positive_sigmoid
from trainer.models.config import ImageTowerConfig
from trainer.models.patch_tower import PatchTower, build_patch_tower
from trainer.parts.teacher_digests import TeacherDigests, store_digest
from trainer.recipe import Context, Part, WithoutPhases
from trainer.store import EmbeddingStore
from trainer.types import Batch, Features, Losses


class DrawnTexts:
    """Which vectors of a store a visit of a sample draws, and these vectors.

    It travels to the data workers, which read while the model computes; each opens the store.
    """

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.folder, self.count, self.key = folder, count, key_of(seed, "facets")
        self.store: EmbeddingStore | None = None

    def __call__(
        self, sample_id: Int64[Tensor, " batch"], epoch: Int64[Tensor, " batch"]
    ) -> Float32[Tensor, "batch drawn dim"]:
        """Unit vectors."""
        self.store = self.store or EmbeddingStore.open(self.folder)
        total = self.store.num_vectors
        which = drawn_texts(sample_id, epoch, count=self.count, total=total, key=self.key)
        # Half precision or int8 on disk: lengths are one only to that precision.
        return normalize(self.store.vectors(sample_id, which), dim=-1)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "store": None}


class Config(RecipeConfig):
    name: Literal["flame"] = "flame"
    model: ImageTowerConfig = ImageTowerConfig()
    """`embed_dim` is the width of the vectors in the store."""
    store: LocalPath
    """Folder written by `tools/embed.py`; it must hold every training sample."""
    texts_per_visit: PositiveInt = 6
    """Vectors drawn for a sample each time, of those that the store has."""
    loss: Literal["mp_sigmoid", "mp_nce"] = "mp_sigmoid"
    """Of an image with the several texts of its own: pairwise sigmoid, or a softmax."""
    head_hidden: PositiveInt | None = None
    """Hidden width of the head; that of the vectors, but at least 4096, where None."""
    logit_scale_init: float | None = Field(default=None, gt=0)
    """Where None, 10 for mp_sigmoid and 1 / 0.07 for mp_nce."""
    logit_bias_init: Annotated[float, OnlyWhere("loss", "mp_sigmoid")] = -10.0
    """Of mp_sigmoid."""
    scale_max: float = Field(default=100.0, gt=1)
    """The scale is kept within [1, scale_max]."""

    def stores(self) -> Sequence[Path]:
        return (self.store,)

    def join(self, seed: int) -> DrawnTexts:
        return DrawnTexts(self.store, self.texts_per_visit, seed)

    @property
    def initial_logit_scale(self) -> float:
        return self.logit_scale_init or (10.0 if self.loss == "mp_sigmoid" else 1 / 0.07)


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> PatchTower:
    return build_patch_tower(
        config.model,
        hidden=config.head_hidden,
        logit_scale=config.initial_logit_scale,
        scale_max=config.scale_max,
        logit_bias=config.logit_bias_init if config.loss == "mp_sigmoid" else None,
        seed=seed,
    )


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.comm = config, context.comm
        store = EmbeddingStore.open(config.store)
        _check(config, store)
        self.model = build_model(config, context.text_tokenizer, context.comm, seed=context.seed)
        digests = {"texts": store_digest(store)}
        self.parts: Mapping[str, Part] = {"store": TeacherDigests(digests, context.comm)}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        assert features.image is not None
        assert features.logit_scale is not None
        assert batch.texts is not None
        texts = batch.texts
        if features.logit_bias is None:
            value = multi_positive_nce(features.image, texts, features.logit_scale, self.comm)
        else:
            value = multi_positive_sigmoid(
                features.image, texts, features.logit_scale, features.logit_bias, self.comm
            )
        return Losses({self.config.loss: (value, 1.0)})


def drawn_texts(
    sample_id: Int64[Tensor, " batch"],
    epoch: Int64[Tensor, " batch"],
    *,
    count: int,
    total: int,
    key: int,
) -> Int64[Tensor, "batch {count}"]:
    """`count` different numbers below `total` for each sample: a function of id, epoch and key."""
    visit = hash_bits(sample_id, key) ^ hash_bits(epoch.long(), key)
    bits = hash_bits(visit[:, None] + torch.arange(total), key)
    return bits.argsort(dim=1)[:, :count]


def _check(config: Config, store: EmbeddingStore) -> None:
    if config.texts_per_visit > store.num_vectors:
        raise ConfigError(
            f"recipe.texts_per_visit is {config.texts_per_visit}, but {config.store} has "
            f"{store.num_vectors} vectors a sample; use at most that many"
        )
    if config.model.embed_dim != store.dim:
        raise ConfigError(
            f"recipe.model.embed_dim is {config.model.embed_dim}, but the vectors of "
            f"{config.store} have {store.dim} numbers; set recipe.model.embed_dim={store.dim}"
        )
