"""Vectors that exist already, as teachers: another store, or FLAME's files, one per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from trainer.data.decode import BadSample
from trainer.data.index import shard_stem
from trainer.data.shards import RawSample
from trainer.errors import DataError
from trainer.store.header import Identity
from trainer.store.store import EmbeddingStore

_CHUNK = 512
_PREFIX_CHARACTERS = 5  # of a key; downloaders write the shard's number there


class StoredVectors:
    """The vectors of a store, to be projected or written in another precision."""

    chunk: int | None = _CHUNK

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._known = set(store.ids.tolist())

    @property
    def identity(self) -> Identity:
        return self.store.identity

    def read(self, sample: RawSample) -> int:
        if sample.sample_id not in self._known:
            raise BadSample(f"no vector in {self.store.folder}")
        return sample.sample_id

    def encode(self, items: Sequence[int]) -> Float32[Tensor, "items vectors dim"]:
        return self.store.vectors(torch.tensor(items, dtype=torch.int64))

    def stand_by(self) -> None:
        """No rank needs another."""


class VectorFiles:
    """A folder of `<key>.pth`, each a saved tensor [vectors, dim], as FLAME's extraction writes.

    They lie in sub-folders named by the first five characters of the key, or by the shard, or in
    the folder itself. Only tensors are read: a file with anything else is refused.
    """

    chunk: int | None = _CHUNK

    def __init__(self, folder: Path, *, name: str, vectors: int = 11, dim: int = 5120) -> None:
        if not folder.is_dir():
            raise DataError(f"no folder {folder}")
        self.folder, self.name, self.shape = folder, name, (vectors, dim)

    @property
    def identity(self) -> Identity:
        return Identity(
            teacher=self.name,
            model="imported",
            tokenizer="imported",
            reads=f"files of {self.folder.name}",
            prompts="imported",
            pooling="imported",
            mask="imported",
            compute="float16",
            vectors=self.shape[0],
            dim=self.shape[1],
        )

    def read(self, sample: RawSample) -> Float32[Tensor, "vectors dim"]:
        """BadSample where a sample has no file; DataError where a file is of another shape."""
        path = self._path(sample)
        try:
            value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises what it likes on damaged files
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path} holds no tensor: {reason}") from error
        if not isinstance(value, Tensor) or tuple(value.shape) != self.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"{path} holds {found}, not {self.shape}")
        return value.float()

    def encode(self, items: Sequence[Tensor]) -> Float32[Tensor, "items vectors dim"]:
        return torch.stack(list(items))

    def stand_by(self) -> None:
        """No rank needs another."""

    def _path(self, sample: RawSample) -> Path:
        folders = (sample.key[:_PREFIX_CHARACTERS], shard_stem(sample.shard), "")
        for folder in folders:
            path = self.folder / folder / f"{sample.key}.pth"
            if path.exists():
                return path
        raise BadSample(f"no {sample.key}.pth")
