"""A start for very many clusters: a coarse k-means, then a small one in every coarse cell."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.points import Points, Resident
from trainer.cluster.problem import KMeansConfig, KMeansResult, Problem
from trainer.cluster.ranks.exchange import exchanged
from trainer.cluster.start.drawn import smallest_hashes
from trainer.comm import Comm
from trainer.hashing import key_of

Run = Callable[[Points, KMeansConfig, Comm], KMeansResult]

SAMPLES_PER_CLUSTER = 16
_COARSE_ITERATIONS, _FINE_ITERATIONS = 8, 4


def hierarchical_start(problem: Problem, restart: int, run: Run) -> Float[Tensor, "held d"]:
    """The rows that this rank holds of K centroids: about sqrt(K) cells of a sample, each split in
    proportion to its size.

    The sample is the 16 K points (all, if there are fewer) with the smallest hashes; each rank
    holds its own part of it. The cells are dealt to the ranks, each is clustered by one. Costs
    about 2 x 16 K x sqrt(K) x 13 x d products where a plain pass over N points costs 2 N K d.
    """
    config, comm = problem.config, problem.comm
    count = min(problem.num_points, SAMPLES_PER_CLUSTER * config.clusters)
    key = key_of(config.seed, "kmeans hierarchy", restart)
    _, places = smallest_hashes(problem.points, count, key, comm)
    sample = _resident(problem.points, places)
    coarse = config.model_copy(
        update={
            "clusters": max(math.isqrt(config.clusters), 1),
            "iterations": _COARSE_ITERATIONS,
            "start": "sampled",
            "assignment": "exact",
            "restarts": 1,
        }
    )
    cells = run(sample, coarse, comm)
    shares = divided(cells.counts.cpu(), config.clusters)
    held = problem.grid.held
    start = torch.zeros(held.stop - held.start, problem.points.dim, device=comm.device)
    first = 0
    for chunk in exchanged(sample, cells.labels.cpu(), coarse.clusters, comm):
        own = torch.zeros(0, problem.points.dim, device=comm.device)
        for cell in chunk.my_cells:
            inside = chunk.cells == cell
            if shares[cell]:
                fine = coarse.model_copy(
                    update={"clusters": int(shares[cell]), "iterations": _FINE_ITERATIONS}
                )
                members = Resident(chunk.rows[inside], chunk.ids[inside])
                own = run(members, fine, Comm.solo(comm.device)).centroids
        part = comm.gather_rows(own)
        low, high = max(first, held.start), min(first + len(part), held.stop)
        if low < high:
            start[low - held.start : high - held.start] = part[low - first : high - first]
        first += len(part)
    return start


def divided(counts: Int64[Tensor, " cells"], clusters: int) -> Int64[Tensor, " cells"]:
    """`clusters` over cells in proportion to their counts: largest remainders, then lowest id.

    Never more than a cell has points, if all cells together have enough.
    """
    total = int(counts.sum())
    exact = [int(count) * clusters for count in counts.tolist()]
    shares = [value // total for value in exact]
    left = clusters - sum(shares)
    by_remainder = sorted(range(len(exact)), key=lambda cell: -(exact[cell] % total))
    for cell in by_remainder[:left]:
        shares[cell] += 1
    return torch.tensor(shares)


def _resident(points: Points, places: Tensor) -> Resident:
    places = torch.sort(places).values
    ids = points.ids(0, len(points)).cpu()[places]
    return Resident(points.take(places), ids)
