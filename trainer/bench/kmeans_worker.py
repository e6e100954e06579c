"""One side of the k-means benchmark in a process of its own, so that its memory can be seen.

Every side gets the same points and first centroids and makes `iterations` updates and one last
assignment. The inertia of all is computed by the same exact pass afterwards.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.cluster.quality import mean_squared_distance
from trainer.cluster.search.assign import assign
from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt
from trainer.hashing import key_of, permutation

_MOST_JUDGED = 1 << 31
"""Distances that the exact pass computes at most; of more, the first points are judged."""


class Size(NamedTuple):
    """One data set."""

    points: int
    clusters: int
    dim: int


class Case(Frozen):
    """One run of one side."""

    name: str
    """What the row is called."""
    side: str
    """ours, faiss, sklearn or superkmeans."""
    size: Size
    iterations: PositiveInt = 5
    probes: PositiveInt | None = None
    """Of ours: two-level search with so many of about sqrt(K) cells a point; exact where None."""


def make_points(size: Size) -> Tensor:
    """Unit rows near a smooth 24-dimensional surface, with noise: not a mixture of few blobs."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(size.points, 24, generator=generator) * torch.linspace(1.0, 0.2, 24)
    bend = torch.randn(24, size.dim, generator=generator)
    mix = torch.randn(size.dim, size.dim, generator=generator) / size.dim**0.5
    points = torch.empty(size.points, size.dim)
    for rows, chunk in zip(points.split(8192), latent.split(8192), strict=True):
        noise = 0.3 * torch.randn(rows.shape, generator=generator)
        torch.nn.functional.normalize(torch.tanh(chunk @ bend) @ mix + noise, out=rows)
    return points


def measure(case: Case, comm: Comm) -> dict[str, Any]:
    """Run one side on this rank's share of the points and describe it."""
    points = make_points(case.size)
    start = points[permutation(case.size.points, key_of("bench"))[: case.size.clusters]].clone()
    cluster = _cluster(case, comm)
    first, last = comm.row_range(case.size.points)
    own = points if comm.world_size == 1 else points[first:last].clone()
    before = _resident_bytes(reset=True)
    comm.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    centroids = cluster(own, start)
    cpu_seconds = comm.gather_json(time.process_time() - cpu)
    comm.barrier()
    seconds, peak = time.perf_counter() - clock, _peak_bytes()
    extra = comm.gather_json(None if peak is None or before is None else peak - before)
    judged = points[: _MOST_JUDGED // case.size.clusters] if comm.is_main else points[:0]
    return {
        "bench": "kmeans",
        "name": case.name,
        **case.size._asdict(),
        "probes": case.probes,
        "ranks": comm.world_size,
        "threads": torch.get_num_threads(),
        "iterations": case.iterations,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(sum(cpu_seconds), 3),
        "rank_cpu_seconds": round(max(cpu_seconds), 3),
        "inertia": _inertia(judged, centroids) * case.size.points,
        "judged": len(judged),
        "extra_bytes": None if None in extra else max(extra),
    }


def _inertia(points: Tensor, centroids: Tensor) -> float:
    """Mean squared distance to the nearest centroid."""
    if len(points) == 0:
        return math.nan
    return mean_squared_distance(points, centroids, assign(points, centroids), Comm.solo())


def _cluster(case: Case, comm: Comm) -> Callable[[Tensor, Tensor], Tensor]:
    """The function to time. What it imports is imported before the clock starts."""
    peers = {"faiss": _faiss, "sklearn": _sklearn, "superkmeans": _superkmeans}
    return peers[case.side](case) if case.side in peers else _ours(case, comm)


def _ours(case: Case, comm: Comm) -> Callable[[Tensor, Tensor], Tensor]:
    clusters = case.size.clusters
    config = KMeansConfig(clusters=clusters, iterations=case.iterations)
    if case.probes is not None:
        two_level = {"assignment": "two_level", "probes": case.probes}
        config = config.model_copy(update=two_level)
    ids = torch.arange(*comm.row_range(case.size.points))
    return lambda points, start: kmeans(points, ids, config, comm, initial=start).centroids


def _faiss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def cluster(points: Tensor, start: Tensor) -> Tensor:
        peer = faiss.Kmeans(
            case.size.dim,
            case.size.clusters,
            niter=case.iterations,
            max_points_per_centroid=case.size.points,
            min_points_per_centroid=1,
        )
        peer.train(points.numpy(), init_centroids=start.numpy())
        peer.assign(points.numpy())
        assert peer.centroids is not None
        return torch.from_numpy(peer.centroids.copy())

    return cluster


def _sklearn(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    warnings.simplefilter("ignore", ConvergenceWarning)
    how = {"n_init": 1, "max_iter": case.iterations, "tol": 0.0, "copy_x": False}

    def cluster(points: Tensor, start: Tensor) -> Tensor:
        peer = KMeans(case.size.clusters, init=start.numpy(), **how)
        return torch.from_numpy(peer.fit(points.numpy()).cluster_centers_)

    return cluster


def _superkmeans(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """Flat, on all points, without stopping early. It draws its own first centroids."""
    from superkmeans import SuperKMeans

    def cluster(points: Tensor, start: Tensor) -> Tensor:
        peer = SuperKMeans(
            case.size.clusters,
            case.size.dim,
            hierarchical=False,
            iters=case.iterations,
            sampling_fraction=1.0,
            max_points_per_cluster=case.size.points,
            n_threads=torch.get_num_threads(),
            early_termination=False,
        )
        centroids = peer.train(points.numpy())
        peer.assign_training_points(points.numpy(), centroids)
        return torch.from_numpy(centroids.copy())

    return cluster


def _resident_bytes(*, reset: bool) -> int | None:
    """Memory held now; with `reset`, the peak that Linux remembers starts anew."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak_bytes() -> int | None:
    return _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)


def main() -> None:
    case, results = Case.model_validate_json(sys.argv[1]), Path(sys.argv[2])
    comm = Comm.from_environment()
    row = measure(case, comm)
    if comm.is_main:
        results.write_text(json.dumps([row]))


if __name__ == "__main__":
    main()
