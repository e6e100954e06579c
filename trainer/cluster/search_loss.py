"""What the two-level search gives away: measured on a few thousand points."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.cluster.kmeans import coarse_cells
from trainer.cluster.points import Points
from trainer.cluster.problem import KMeansConfig
from trainer.cluster.search.assign import assign, pair_distances
from trainer.cluster.search.two_level import assign_two_level
from trainer.cluster.start.drawn import smallest_hashes
from trainer.comm import Comm
from trainer.hashing import key_of

SAMPLES = 4096


def search_loss(
    points: Points,
    centroids: Float[Tensor, "k d"],
    config: KMeansConfig,
    comm: Comm,
    *,
    samples: int = SAMPLES,
) -> dict[str, float]:
    """Share of points that get their nearest centroid, and inertia above that of the exact search.

    On the same points, drawn by hash of id, for any number of ranks.
    """
    _, places = smallest_hashes(points, samples, key_of(config.seed, "search loss"), comm)
    rows = points.take(places).to(comm.device, torch.float32)
    cells = coarse_cells(centroids, config, comm)
    labels = assign_two_level(rows, cells)
    best = assign(rows, centroids)
    found = torch.stack([pair_distances(rows, centroids[k]) for k in (labels, best)], 1)
    everyone = comm.gather_rows(found)
    same = comm.gather_rows(labels == best)
    # sorted, so that the order of the ranks does not enter the sums
    ours, exact = (float(torch.sort(column).values.sum()) for column in everyone.unbind(1))
    return {
        "search_recall": float(same.double().mean()),
        "search_inertia_above_exact": ours / exact - 1.0 if exact > 0 else 0.0,
    }
