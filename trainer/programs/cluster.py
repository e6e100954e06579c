"""One clustering of an embedding store, from its first pass to labels on disk; resumable.

OUT/job.json              what is asked for; another question needs another folder
OUT/state/                the centroids after the newest updates: where a killed run goes on
OUT/centroids.safetensors [k, d] and how many samples each has, once the iterations are done
OUT/labels/, *.npy        the clusters of every sample: `ClusterLabels.open(OUT)`
OUT/clusters.json         figures
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.lock import sole_user
from trainer.cluster.duplicates import without_duplicates
from trainer.cluster.grid import Grid
from trainer.cluster.kmeans import KMeansResult, State, cluster_on
from trainer.cluster.layout import laid_out
from trainer.cluster.points import Points
from trainer.cluster.problem import KMeansConfig, pose
from trainer.cluster.quality import balance, size_quantiles
from trainer.cluster.search_loss import search_loss
from trainer.cluster.sidecar import SIDECARS, lookup, merge_sidecars, write_sidecars
from trainer.cluster.stored import StoredPoints
from trainer.comm import Comm, agreed
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError, DataError
from trainer.programs.cluster_state import (
    digest_of,
    read_centroids,
    state_on,
    warm_start,
    write_centroids,
    write_whole,
)
from trainer.store import EmbeddingStore
from trainer.store.sources import write_sources

JOB, CENTROIDS, FIGURES = "job.json", "centroids.safetensors", "clusters.json"
Say = Callable[[str], None]


class ClusterJob(Frozen):
    """Everything that the labels depend on besides the store."""

    kmeans: KMeansConfig
    per_sample: PositiveInt = 8
    """Clusters listed for every sample, the nearest first."""
    min_cosine: float | None = Field(default=None, ge=-1.0, le=1.0)
    """A cluster other than the nearest is listed only if its centroid is as near as that."""
    which: int = Field(default=0, ge=0)
    """Which of a sample's vectors."""
    warm_start: Path | None = None
    """A file with a tensor `centroids`, as this program writes it, to start from."""
    duplicate_cosine: float | None = Field(default=None, gt=0.0, le=1.0)
    """Samples that are at least this near to an earlier one do not count for the centroids."""


def cluster_store(folder: Path, out: Path, job: ClusterJob, comm: Comm, *, say: Say) -> Path:
    """Cluster the store in `folder` and write everything into `out`; every rank calls.

    A run that was killed goes on after its last whole iteration, and with the first shard that
    has no labels, on any number of ranks; the bytes are those of a run that was not killed.
    """
    with sole_user(out, comm):
        store = _opened(folder, comm)
        agreed(comm, lambda: _same_job(out, store, job) if comm.is_main else None)
        points = _points(store, job, comm)
        grid = laid_out(job.kmeans, points.dim, comm)
        centroids, figures = _centroids(points, out, job, grid, comm, say)
        _label(points, centroids, out, job, grid, comm, say)
        names = list(store.header.shards)
        agreed(comm, lambda: write_sources(out, store.header) if comm.is_main else None)
        samples = merge_sidecars(out / SIDECARS, names, out, comm)
        agreed(comm, lambda: _finish(out, samples, figures, comm, say))
    return out


def _opened(folder: Path, comm: Comm) -> EmbeddingStore:
    return agreed(comm, lambda: EmbeddingStore.open(folder))  # or all ranks stop


def _points(store: EmbeddingStore, job: ClusterJob, comm: Comm) -> StoredPoints:
    unit_length = job.kmeans.spherical
    return agreed(comm, lambda: StoredPoints(store, comm, which=job.which, unit_length=unit_length))


def _same_job(out: Path, store: EmbeddingStore, job: ClusterJob) -> None:
    """Write down what is asked for, or compare it with what was."""
    asked = {
        "store": hashlib.sha256(store.header.model_dump_json().encode()).hexdigest(),
        **job.model_dump(mode="json", exclude={"kmeans": {"grid", "centroid_gib"}}),
    }
    text = json.dumps(asked, indent=1)
    if not (out / JOB).exists():
        write_whole(out / JOB, text.encode())
    elif (before := json.loads((out / JOB).read_text())) != asked:
        differing = [key for key in asked if before.get(key) != asked[key]]
        raise ConfigError(
            f"{out} holds a clustering with another {' and '.join(differing)} (see {out / JOB});"
            " give another folder, or delete it"
        )


# -- centroids --------------------------------------------------------------------------------


def _centroids(
    points: StoredPoints, out: Path, job: ClusterJob, grid: Grid, comm: Comm, say: Say
) -> tuple[Tensor, dict[str, Any]]:
    """The centroids that this rank holds, and the figures: those on disk, or computed now."""
    done = comm.broadcast_json((out / CENTROIDS).exists())
    if not done:
        _cluster(points, out, job, grid, comm, say)
    return read_centroids(out / CENTROIDS, grid, comm)


def _cluster(
    points: StoredPoints, out: Path, job: ClusterJob, grid: Grid, comm: Comm, say: Say
) -> None:
    state = Checkpointer(out / "state", comm)
    restored = state.latest()
    if restored is not None:
        say(f"going on after iteration {restored.step}")
    used = _without_duplicates(points, job, comm, say)
    given = None if restored or not job.warm_start else job.warm_start
    initial = None if given is None else warm_start(given, grid, points.dim)
    resume = None if restored is None else state_on(restored, grid, comm)
    facts = None if resume is None else resume.facts
    problem = pose(used, job.kmeans, comm, grid, initial=initial, facts=facts)
    result = cluster_on(problem, resume, _Watch(job.kmeans, state, grid, say))
    figures = {"clustered": int(result.counts.sum()), **_figures(result)}
    if job.kmeans.assignment == "two_level":
        figures |= search_loss(points, result.centroids, job.kmeans, comm)
    write_centroids(out / CENTROIDS, result.centroids, result.counts, figures, grid, comm)


def _without_duplicates(points: StoredPoints, job: ClusterJob, comm: Comm, say: Say) -> Points:
    if job.duplicate_cosine is None:
        return points
    kept = without_duplicates(points, job.duplicate_cosine, comm, seed=job.kmeans.seed)
    counts = comm.sum(torch.tensor([len(kept), len(points)], device=comm.device)).tolist()
    say(f"{counts[1] - counts[0]} of {counts[1]} samples are near-duplicates and do not count")
    if counts[0] < job.kmeans.clusters <= counts[1]:
        raise ConfigError(
            f"{job.kmeans.clusters} clusters need at least as many samples, and without"
            f" near-duplicates (cosine of {job.duplicate_cosine} or more) {counts[0]} of"
            f" {counts[1]} are left; use at most {counts[0]} clusters or a higher duplicate_cosine"
        )
    return kept


def _figures(result: KMeansResult) -> dict[str, Any]:
    count = max(int(result.counts.sum()), 1)
    return {
        "mean_squared_distance": result.inertia / count,
        "iterations": len(result.objective),
        "objective": result.objective,
        "repaired": result.repaired,
        **balance(result.counts),
        **size_quantiles(result.counts),
    }


class _Watch:
    """Saves the state after every update and says how it goes, on rank 0."""

    def __init__(self, config: KMeansConfig, state: Checkpointer, grid: Grid, say: Say) -> None:
        self._config, self._state, self._grid, self._say = config, state, grid, say
        self._began: float | None = None
        self._first = 0

    def scored(self, iteration: int, objective: float, moved: float | None) -> None:
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, iteration
        passes = iteration - self._first
        left = (
            ""
            if not passes
            else _time_left((self._config.iterations - iteration) * (now - self._began) / passes)
        )
        change = "" if moved is None else f", {100 * moved:.2f} % of the samples moved"
        self._say(
            f"iteration {iteration} of {self._config.iterations}:"
            f" mean squared distance {objective:.6g}{change}{left}"
        )

    def updated(self, state: State) -> None:
        rows = state.centroids[self._grid.owned_here]
        own = {f"{self._grid.owned.start:012d}": rows} if len(rows) else {}
        told = {
            "facts": list(state.facts),
            "objective": state.objective,
            "repaired": state.repaired,
        }
        self._state.save(len(state.objective), {"centroids": own}, told, {})


def _time_left(seconds: float) -> str:
    if seconds < 90:
        return f", {seconds:.0f} s left at most"
    return f", {seconds / 60:.0f} min left at most"


# -- labels -----------------------------------------------------------------------------------


def _label(
    points: StoredPoints,
    centroids: Tensor,
    out: Path,
    job: ClusterJob,
    grid: Grid,
    comm: Comm,
    say: Say,
) -> None:
    stamp = comm.broadcast_json(digest_of(out / CENTROIDS) if comm.is_main else None)
    find = lookup(centroids, points, job.kmeans, comm, count=job.per_sample, grid=grid)

    def write() -> None:
        write_sidecars(
            points,
            find,
            out / SIDECARS,
            stamp=stamp,
            min_cosine=job.min_cosine,
            report=say,
        )

    agreed(comm, write)


def _finish(out: Path, samples: int, figures: dict[str, Any], comm: Comm, say: Say) -> None:
    if comm.is_main:
        whole = {"samples": samples, **figures}
        write_whole(out / FIGURES, (json.dumps(whole, indent=1) + "\n").encode())
        say(f"the clusters of {samples} samples are in {out}")


def read_figures(out: Path) -> dict[str, Any]:
    """What `clusters.json` says of a finished clustering."""
    try:
        figures: dict[str, Any] = json.loads((out / FIGURES).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{out} holds no finished clustering: {error}") from error
    return figures
