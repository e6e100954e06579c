"""Groups found by a frozen teacher, once, over the whole corpus."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.cluster.labels import ClusterLabels
from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt
from trainer.data.embeddings import EmbeddingStore


class TeacherConfig(Frozen):
    """An embedding store and how its vectors become groups."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    store: Path
    """Folder written by `tools/embed.py`."""
    clusters: PositiveInt
    weight: float = Field(default=1.0, gt=0)
    """Of the pair of terms that this teacher adds."""
    target_temperature: float = -1.0
    """Soft targets from the teacher's centroids; 0 or less means one-hot, as in the paper."""
    iterations: PositiveInt = 20
    centre: bool = True
    """Subtract the mean vector before clustering."""


class TeacherGroups(NamedTuple):
    """The same for the whole run: a frozen teacher's groups never change."""

    config: TeacherConfig
    labels: ClusterLabels
    centroids: Float[Tensor, "local dim"]
    """Rows `comm.row_range(clusters)`."""


def load_teacher(config: TeacherConfig, comm: Comm) -> TeacherGroups:
    """Cluster a store's vectors; each rank reads a contiguous share of its rows."""
    store = EmbeddingStore.open(config.store)
    share = -(-len(store) // comm.world_size)
    mine = torch.from_numpy(store.ids[comm.rank * share : (comm.rank + 1) * share].copy())
    vectors = store.rows(mine)
    if config.centre:
        total = comm.sum(vectors.double().sum(0))
        vectors = vectors - (total / len(store)).float()
    settings = KMeansConfig(clusters=config.clusters, iterations=config.iterations)
    result = kmeans(vectors, mine, settings, comm)
    first, last = comm.row_range(config.clusters)
    labels = ClusterLabels.gather(mine, result.labels, comm)
    return TeacherGroups(config, labels, result.centroids[first:last])
