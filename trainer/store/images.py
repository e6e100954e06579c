"""Stored features in place of images: which vectors of a sample a visit reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.comm import Comm, agreed
from trainer.data.decode import BadSample
from trainer.errors import ConfigError, DataError
from trainer.hashing import key_of, permutation
from trainer.store.header import Identity
from trainer.store.store import EmbeddingStore

_VIEWS = ", views of seed "
"""Stands in an identity before what its random views were drawn by."""


class StoredImages:
    """Vectors of samples from several stores of one encoder. Each process opens the stores."""

    def __init__(self, folders: Sequence[Path], *, dim: int, seed: int) -> None:
        self.folders, self.dim, self.seed = tuple(folders), dim, seed

    @cached_property
    def stores(self) -> tuple[EmbeddingStore, ...]:
        return tuple(EmbeddingStore.open(folder) for folder in self.folders)

    def whole(self, sample_id: int) -> Float32[Tensor, " dim"]:
        """The vector of the whole image; BadSample where no store has the sample."""
        return _read(self._of(sample_id), sample_id, (0,))[0]

    def views(
        self, sample_id: int, epoch: int, count: int, *, purpose: str
    ) -> Float32[Tensor, "count dim"]:
        """`count` different random views; the whole image where one is asked for and a store has
        nothing else.

        Which ones is a hash of the seed, the epoch, the sample and the purpose.
        """
        store = self._of(sample_id)
        random = store.num_vectors - 1
        if count > random and (random or count > 1):
            raise DataError(
                f"{store.folder} holds training samples and has {random} random views of each, not "
                f"{count}; store more (tools/tune.py --views {count}), or lower recipe.views"
            )
        if not random:
            return _read(store, sample_id, (0,))
        key = key_of(self.seed, "stored views", epoch, purpose, sample_id)
        drawn = permutation(random, key)[:count] + 1
        return _read(store, sample_id, drawn.tolist())

    def check(self, comm: Comm, *, views: int) -> str:
        """A digest of the encoder. ConfigError on all ranks where the stores are of several ones,
        or have too few views."""
        agreed(comm, lambda: self._check(views))
        said = json.dumps(_of_encoder(self.stores[0].identity), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def _check(self, views: int) -> None:
        """What the first store says is what is trained on; a view that misses elsewhere is told
        when it is asked for."""
        first = self.stores[0]
        for store in self.stores:
            if store.dim != self.dim:
                raise ConfigError(
                    f"{store.folder} holds vectors of {store.dim} numbers, not {self.dim}; set "
                    f"recipe.model.image.stored.dim={store.dim}"
                )
            refuse_another_encoder(store, first)
        _refuse_one_name_twice(self.stores)
        random = first.num_vectors - 1
        if views > max(random, 1):
            what = f"{random} random views" if random else "the whole image alone"
            raise ConfigError(
                f"{first.folder} has {what} of a sample, and the recipe compares {views}; store "
                f"more (tools/tune.py --views {views}), or set recipe.views={max(random, 1)}"
            )

    def _of(self, sample_id: int) -> EmbeddingStore:
        for store in self.stores:
            if store.has(sample_id):
                return store
        raise BadSample(f"no vector in {', '.join(map(str, self.folders))}")

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "stores"}


def _read(
    store: EmbeddingStore, sample_id: int, which: Sequence[int]
) -> Float32[Tensor, "count dim"]:
    vectors = store.vectors(torch.tensor([sample_id]), which)[0]
    if not bool(torch.isfinite(vectors).all()):
        raise BadSample(f"its vector in {store.folder} is not finite")
    return vectors


def _refuse_one_name_twice(stores: Sequence[EmbeddingStore]) -> None:
    """Samples of equal shard names and keys have equal ids, whatever they show."""
    seen: dict[str, tuple[str, Path]] = {}
    for store in stores:
        for name, entry in store.header.shards.items():
            source, folder = seen.setdefault(name, (entry.source, store.folder))
            if source != entry.source:
                raise ConfigError(
                    f"{folder} and {store.folder} are of different shards called {name}, whose "
                    "samples can't be told apart; name their sets (train: {NAME: SHARDS}) and "
                    "embed anew"
                )


def refuse_another_encoder(store: EmbeddingStore, first: EmbeddingStore) -> None:
    """ConfigError where their vectors are of two spaces, whatever their widths."""
    one, other = (_of_encoder(each.identity) for each in (first, store))
    for key in one:
        if one[key] != other[key]:
            raise ConfigError(
                f"{store.folder} and {first.folder} are not of one encoder: their {key} differs "
                f"({other[key]} and {one[key]}); make both with the same model"
            )


def _of_encoder(identity: Identity) -> dict[str, object]:
    """An identity without what random views and precision on disk change."""
    said = identity.model_dump(exclude={"teacher", "vectors", "dtype", "reads"})
    return said | {"tokenizer": identity.tokenizer.partition(_VIEWS)[0]}
