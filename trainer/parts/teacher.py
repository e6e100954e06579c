"""Groups found by a frozen teacher, once, over the whole corpus.

A teacher is an embedding store, what its vectors become before they are clustered, and what its
groups weigh. Its labels never change, so they are found once and kept in the run's workdir; an
episode only averages the students' features within them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from trainer.cluster.kmeans import KMeansConfig, KMeansResult, cluster
from trainer.cluster.merge import Rows, write_map
from trainer.cluster.progress import Interruptible
from trainer.cluster.quality import normalized_mutual_information
from trainer.cluster.report import unknown_rate
from trainer.comm import Comm
from trainer.config import Frozen, LocalPath, PositiveInt
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.errors import CheckpointError, ConfigError
from trainer.parts.teacher_digests import store_digest
from trainer.parts.teacher_points import teacher_points
from trainer.recipe import Context
from trainer.stop import Check, go_on
from trainer.store import EmbeddingStore
from trainer.tensor_files import read_tensors

Student = Literal["image", "text"]
MOST_ON_DEVICE = 100_000_000
"""Labels of so many samples are held on the device (12 bytes each); of more, mapped from disk."""


class TeacherConfig(Frozen):
    """An embedding store and how its vectors become groups."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    """Under which its terms are logged: small letters, digits, hyphens."""
    store: LocalPath
    """Folder written by `tools/embed.py`."""
    clusters: PositiveInt
    """Groups that its vectors are put into."""
    weight: float = Field(default=1.0, gt=0)
    """Of the terms that this teacher adds, together for a student of each kind."""
    target_temperature: float = -1.0
    """Soft targets from the teacher's centroids; 0 or less means one-hot, as in the paper."""
    vectors: tuple[int, ...] | None = None
    """Which of a sample's vectors are used, from 0; all where None."""
    facets: Literal["pooled", "each"] = "pooled"
    """`pooled`: one clustering of their mean. `each`: one of each vector, with terms of its own."""
    centre: bool = True
    """Subtract the mean of the corpus before clustering."""
    pca: PositiveInt | None = None
    """Cluster this many principal components; the whole vectors where None."""
    spherical: bool = False
    """Keep centroids at length one."""
    iterations: PositiveInt = 20
    """Updates of the centroids, once per run."""
    students: tuple[Student, ...] = ("image", "text")
    """Whose features learn from the groups."""


class TeacherGroups(NamedTuple):
    """One clustering: the same for the whole run, as a frozen teacher's groups never change."""

    config: TeacherConfig
    weight: float
    """Of the pair of terms of this clustering."""
    labels: ClusterLabels
    centroids: Float[Tensor, "local dim"]
    """Rows `comm.row_range(clusters)`, in the teacher's frame."""


class Teachers(NamedTuple):
    """All that a run's teachers say."""

    groups: Mapping[str, TeacherGroups]
    """By name; `<name>-<vector>` where each facet has groups of its own."""
    digests: Mapping[str, str]
    """Of what was clustered and how, by the teacher's name."""


def load_teachers(
    configs: Sequence[TeacherConfig],
    comm: Comm,
    *,
    workdir: Path,
    corpus: Int64[Tensor, " samples"] | None = None,
    check: Check = go_on,
) -> Teachers:
    """Cluster every teacher's store, or take from the workdir what was found there before.

    `corpus` are the ids of the training samples: a store may hold others, which must not shape
    the groups. All of the store where None. `check` is called between passes of a clustering.
    """
    groups: dict[str, TeacherGroups] = {}
    digests: dict[str, str] = {}
    for config in configs:
        store = EmbeddingStore.open(config.store)
        digests[config.name] = _digest(config, store, corpus)
        folder = workdir / "teachers" / config.name
        if not _is_kept(folder, digests[config.name], config, comm):
            _find_groups(config, store, folder, comm, corpus, check)
            _keep(folder, digests[config.name], comm)
        found = _kept_groups(config, _clusterings(config, store), folder, comm)
        if twice := sorted(set(found) & (groups.keys() | {"image", "text"})):
            raise ConfigError(f"several teachers or spaces are named {twice[0]}; rename one")
        groups |= found
    return Teachers(groups, digests)


def training_ids(context: Context) -> Int64[Tensor, " samples"] | None:
    """Ids of the training samples; None where no index tells them."""
    if context.data.reader != "indexed":
        return None
    return torch.as_tensor(ShardSet.open(context.data.train).ids)


def overlap(
    teachers: Mapping[str, TeacherGroups],
    ids: Int64[Tensor, " samples"],
    clustered: Mapping[Student, KMeansResult],
    comm: Comm,
) -> dict[str, float]:
    """How many of this episode's samples each teacher does not know, and how far its groups are
    the clusters that were found in each space; over all ranks."""
    figures: dict[str, float] = {}
    for name, groups in teachers.items():
        figures[f"{name}_unknown_rate"] = unknown_rate(groups.labels, ids, comm)
        known = groups.labels.of(ids)
        for space, result in clustered.items():
            figures[f"nmi_{space}_{name}"] = normalized_mutual_information(
                result.labels, known, comm
            )
    return figures


def _clusterings(config: TeacherConfig, store: EmbeddingStore) -> dict[str, tuple[int, ...]]:
    """Name of each clustering, and the vectors whose mean is clustered."""
    vectors = tuple(range(store.num_vectors)) if config.vectors is None else config.vectors
    if wrong := [vector for vector in vectors if not 0 <= vector < store.num_vectors]:
        raise ConfigError(
            f"teacher {config.name}: vectors has {wrong[0]}, but {config.store} has vectors 0 to "
            f"{store.num_vectors - 1}"
        )
    if config.facets == "pooled":
        return {config.name: vectors}
    return {f"{config.name}-{vector}": (vector,) for vector in vectors}


def _find_groups(
    config: TeacherConfig,
    store: EmbeddingStore,
    folder: Path,
    comm: Comm,
    corpus: Tensor | None,
    check: Check,
) -> None:
    """Cluster over all ranks; the main rank writes labels and centroids."""
    settings = KMeansConfig(
        clusters=config.clusters, iterations=config.iterations, spherical=config.spherical
    )
    for name, vectors in _clusterings(config, store).items():
        points = teacher_points(
            store, vectors, comm, centre=config.centre, pca=config.pca, corpus=corpus
        )
        _check_count(config, int(comm.sum(torch.tensor(len(points), device=comm.device))))
        result = cluster(points, settings, comm, observer=Interruptible(check))
        ids = points.ids(0, len(points)).cpu().numpy()
        own = Rows(ids, result.labels[:, None].int().cpu().numpy())
        write_map(folder / name, [own], 1, comm)
        if comm.is_main:
            save_file(
                {"centroids": result.centroids.cpu()}, folder / name / "centroids.safetensors"
            )


def _check_count(config: TeacherConfig, samples: int) -> None:
    if config.clusters > samples:
        raise ConfigError(
            f"teacher {config.name} has {config.clusters} clusters for {samples} training samples "
            f"in {config.store}; use at most {max(1, samples // 10)}, a tenth"
        )


def _is_kept(folder: Path, digest: str, config: TeacherConfig, comm: Comm) -> bool:
    """Whether the main rank finds these groups; a CheckpointError where it finds others."""
    file = folder / "digest"
    found = comm.broadcast_json(file.read_text() if comm.is_main and file.exists() else None)
    if found not in (None, digest):
        raise CheckpointError(
            f"{folder} holds groups of another teacher {config.name}, or found in another way "
            f"({found[:12]} there, {digest[:12]} now); restore {config.store} and its settings, "
            "or choose another workdir"
        )
    return found is not None


def _keep(folder: Path, digest: str, comm: Comm) -> None:
    """Written last: without it the groups are found again."""
    if comm.is_main:
        (folder / "digest").write_text(digest)
    comm.barrier()


def _kept_groups(
    config: TeacherConfig, names: Mapping[str, tuple[int, ...]], folder: Path, comm: Comm
) -> dict[str, TeacherGroups]:
    groups = {}
    for name in names:
        labels = ClusterLabels.open(folder / name)
        if len(labels) <= MOST_ON_DEVICE:
            labels = labels.to(comm.device)
        file = folder / name / "centroids.safetensors"
        centroids = read_tensors(file, of="centroids")["centroids"]
        first, last = comm.row_range(config.clusters)
        shard = centroids[first:last].to(comm.device)
        groups[name] = TeacherGroups(config, config.weight / len(names), labels, shard)
    return groups


def _digest(config: TeacherConfig, store: EmbeddingStore, corpus: Tensor | None) -> str:
    """SHA-256 of the vectors and of what decides their groups."""
    samples = b"" if corpus is None else corpus.sort().values.numpy().tobytes()
    decides = config.model_dump_json(
        include={"clusters", "vectors", "facets", "centre", "pca", "spherical", "iterations"}
    )
    return hashlib.sha256(f"{store_digest(store)}\n{decides}\n".encode() + samples).hexdigest()
