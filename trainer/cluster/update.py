"""What becomes of centroids without points, and of their lengths."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from trainer.cluster.exact import ordered_sum

_SPLIT = 1.0 / 1024.0


def refilled(centroids: Tensor, counts: Tensor) -> tuple[Tensor, int]:
    """Give every empty cluster half of the largest one: copies of its centroid pushed apart.

    Empty clusters in order of id; of equally large donors the lowest id. Coordinates of the two
    halves differ by factors 1 +- 1/1024 with alternating sign, as in faiss, which draws the donor.
    """
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return centroids, 0
    heap = [(-count, cluster) for cluster, count in enumerate(counts.tolist()) if count]
    heapq.heapify(heap)
    signs = torch.ones(centroids.shape[1], device=centroids.device)
    signs[1::2] = -1.0
    for cluster in empty:
        size, donor = heapq.heappop(heap)
        centroids[cluster] = centroids[donor] * (1.0 + _SPLIT * signs)
        centroids[donor] *= 1.0 - _SPLIT * signs
        for part, owner in ((-(-size // 2), donor), (size // 2, cluster)):
            heapq.heappush(heap, (part, owner))
    return centroids, len(empty)


def unit_or(rows: Tensor, *, instead: Tensor) -> Tensor:
    """Rows scaled to length one; a zero row is replaced by that of `instead`."""
    lengths = ordered_sum(rows.double().square()).sqrt()[:, None]
    return torch.where(lengths > 0, (rows.double() / lengths).float(), instead)
