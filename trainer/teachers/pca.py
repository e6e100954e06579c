"""Principal components of a store's vectors, from one pass over it, and teachers seen through them.

Vectors are centred and projected; neither whitened nor normalised again, as ProtoCLIP does with
its text teacher (arXiv 2206.10996).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainer.comm import Comm
from trainer.data.shards import RawSample
from trainer.errors import ConfigError, DataError
from trainer.store.header import Identity, write_whole
from trainer.store.store import EmbeddingStore
from trainer.teachers.fill import Teacher

FILE = "pca.safetensors"
_ROWS = 4096


class Pca(NamedTuple):
    """A centre, orthonormal directions by falling variance, and what they keep."""

    mean: Float32[Tensor, " dim"]
    directions: Float32[Tensor, "kept dim"]
    variance: Float32[Tensor, " kept"]
    """Along each direction."""
    total_variance: Float32[Tensor, ""]
    """Along all directions of the whole space."""

    @property
    def kept_share(self) -> float:
        """Of the variance."""
        return float(self.variance.sum() / self.total_variance.clamp(min=1e-30))

    def project(
        self, vectors: Float[Tensor, "rows vectors dim"]
    ) -> Float32[Tensor, "rows vectors kept"]:
        return (vectors.float() - self.mean) @ self.directions.T

    def save(self, path: Path) -> str:
        """Write it; the SHA-256 of the file."""
        data = save(self._asdict())
        write_whole(path, data)
        return hashlib.sha256(data).hexdigest()


def load_pca(path: Path) -> tuple[Pca, str]:
    """A saved one and the SHA-256 of its file."""
    try:
        data = path.read_bytes()
        return Pca(**load(data)), hashlib.sha256(data).hexdigest()
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(f"{path} holds no principal components: {error}") from error


def fit_pca(store: EmbeddingStore, dim: int, comm: Comm) -> Pca:
    """The first `dim` components of all vectors of a store; the same on every rank.

    Each rank adds up its share's sums and d x d products in float64, block by block; they are
    all-reduced once. A direction's sign is such that its largest entry is positive.
    """
    if not 0 < dim <= store.dim:
        raise ConfigError(f"{dim} components of {store.dim} dimensions; choose 1 to {store.dim}")
    count = torch.zeros(1, dtype=torch.float64)
    total = torch.zeros(store.dim, dtype=torch.float64)
    products = torch.zeros(store.dim, store.dim, dtype=torch.float64)
    for block in store.blocks(comm.rank, comm.world_size):
        for start in range(0, len(block), _ROWS):
            rows = block.read(slice(start, start + _ROWS)).flatten(0, 1).double()
            count += len(rows)
            total += rows.sum(0)
            products += rows.T @ rows
    count, total, products = (
        comm.sum(value.to(comm.device)).cpu() for value in (count, total, products)
    )
    if count < 2:
        raise DataError(f"{store.folder} has {int(count)} vectors, too few for components")
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    directions = vectors.T.flip(0)[:dim]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return Pca(
        mean=mean.float(),
        directions=(directions * largest.sign()).float().contiguous(),
        variance=values.flip(0)[:dim].clamp(min=0).float().contiguous(),
        total_variance=values.clamp(min=0).sum().float(),
    )


class ProjectedTeacher:
    """A teacher whose vectors are projected before they are stored."""

    def __init__(self, teacher: Teacher, pca: Pca, digest: str) -> None:
        if pca.mean.shape[0] != teacher.identity.dim:
            raise ConfigError(
                f"the components are of {pca.mean.shape[0]} dimensions, but "
                f"{teacher.identity.teacher} gives {teacher.identity.dim}"
            )
        self.teacher, self.pca, self.digest = teacher, pca, digest

    @property
    def identity(self) -> Identity:
        changes = {"dim": len(self.pca.directions), "projection": self.digest}
        return self.teacher.identity.model_copy(update=changes)

    @property
    def chunk(self) -> int | None:
        return self.teacher.chunk

    def read(self, sample: RawSample) -> Any:
        return self.teacher.read(sample)

    def encode(self, items: Sequence[Any]) -> Float32[Tensor, "items vectors kept"]:
        return self.pca.project(self.teacher.encode(items))

    def stand_by(self) -> None:
        self.teacher.stand_by()
