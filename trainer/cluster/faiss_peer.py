"""faiss as a backend: the peer to compare with, for what fits one process."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.cluster.problem import KMeansConfig, Problem
from trainer.errors import ConfigError

_FAISS_CLUSTERS = 50_000
_FAISS_BYTES = 8 << 30


def faiss_centroids(problem: Problem, initial: Tensor | None) -> tuple[Tensor, list[float]]:
    """Centroids and mean objective per iteration of faiss.Kmeans, on rank 0, equal on all ranks.

    Points are taken in order of id, so that the ranks don't matter. With more than 256 points a
    cluster faiss trains on a sample of them, as by default. ConfigError above the limits.
    """
    config, comm = problem.config, problem.comm
    _check_faiss_limits(problem)
    points = problem.points
    rows = comm.gather_rows(points.rows(0, len(points)).to(comm.device, torch.float32))
    ids = comm.gather_rows(points.ids(0, len(points)).to(comm.device))
    order = torch.argsort(ids, stable=True)
    centroids = rows.new_zeros((config.clusters, rows.shape[1]))
    objective: list[float] = []
    if comm.is_main:
        centroids, objective = _train_faiss(rows[order].cpu(), config, initial)
    centroids = comm.broadcast(centroids.to(comm.device))
    objective = comm.broadcast_json(objective)
    return centroids, objective


def _train_faiss(
    points: Tensor, config: KMeansConfig, initial: Tensor | None
) -> tuple[Tensor, list[float]]:
    import faiss

    trainer = faiss.Kmeans(
        points.shape[1],
        config.clusters,
        niter=config.iterations,
        nredo=config.restarts,
        seed=config.seed,
        spherical=config.spherical,
        min_points_per_centroid=1,
        gpu=faiss.get_num_gpus() > 0,
    )
    start = None if initial is None else initial.cpu().float().numpy()
    trainer.train(points.contiguous().numpy(), init_centroids=start)
    # the log runs over all restarts, and its unit is the sum over the points trained on
    used = min(points.shape[0], 256 * config.clusters)
    assert trainer.obj is not None
    assert trainer.centroids is not None
    objective = [float(value) / used for value in trainer.obj]
    return torch.from_numpy(trainer.centroids.copy()), objective


def _check_faiss_limits(problem: Problem) -> None:
    clusters, size = problem.config.clusters, problem.num_points * problem.points.dim * 4
    if clusters > _FAISS_CLUSTERS or size > _FAISS_BYTES:
        raise ConfigError(
            f"backend faiss takes at most {_FAISS_CLUSTERS} clusters and {_FAISS_BYTES >> 30} GiB"
            f" of points, and these are {clusters} and {size / 2**30:.1f} GiB; use backend: torch"
        )
    largest = problem.facts.largest
    if 4.0 * problem.points.dim * largest**2 > torch.finfo(torch.float32).max:
        raise ConfigError(  # faiss ends the whole process where a distance is not finite
            f"squared distances of points with values up to {largest:.3g} overflow in faiss, which"
            " takes them in float32; use backend: torch, or smaller values"
        )
