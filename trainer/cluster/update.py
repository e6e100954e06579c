"""What becomes of centroids without points, and of their lengths."""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.exact import ordered_sum
from trainer.comm import Comm

_SPLIT = 1.0 / 1024.0


def refilled(
    centroids: Float[Tensor, "held d"],
    counts: Int64[Tensor, " k"],
    *,
    first: int = 0,
    scorers: Comm | None = None,
) -> tuple[Tensor, int]:
    """Give every empty cluster half of the largest one: copies of its centroid pushed apart.

    Empty clusters in order of id; of equally large donors the lowest id. Coordinates of the two
    halves differ by factors 1 +- 1/1024 with alternating sign, as in faiss, which draws the donor.
    Counts are of all clusters; the scorers hold slices of their centroids, this rank from `first`
    on. Only rows that give or receive are sent.
    """
    splits = splits_of(counts)
    if not splits:
        return centroids, 0
    involved = torch.tensor(splits, device=centroids.device).unique()
    mine = involved[(involved >= first) & (involved < first + len(centroids))]
    rows = (scorers or Comm.solo()).gather_rows(centroids[mine - first])
    place = {cluster: number for number, cluster in enumerate(involved.tolist())}
    signs = torch.ones(centroids.shape[1], device=centroids.device)
    signs[1::2] = -1.0
    for cluster, donor in splits:
        rows[place[cluster]] = rows[place[donor]] * (1.0 + _SPLIT * signs)
        rows[place[donor]] *= 1.0 - _SPLIT * signs
    centroids[mine - first] = rows[torch.isin(involved, mine)]
    return centroids, len(splits)


def splits_of(counts: Int64[Tensor, " k"]) -> list[tuple[int, int]]:
    """Each empty cluster and the one that gives it half of its points, in order."""
    counts = counts.cpu()
    empty = (counts == 0).nonzero().flatten().tolist()
    # as many as there are empty ones can give; the others never come first
    largest = torch.sort(counts, descending=True, stable=True).indices[: len(empty)]
    heap = [(-int(counts[cluster]), cluster) for cluster in largest.tolist() if counts[cluster]]
    heapq.heapify(heap)
    splits = []
    for cluster in empty:
        size, donor = heapq.heappop(heap)
        splits.append((cluster, donor))
        for part, owner in ((-(-size // 2), donor), (size // 2, cluster)):
            heapq.heappush(heap, (part, owner))
    return splits


def unit_or(rows: Tensor, *, instead: Tensor) -> Tensor:
    """Rows scaled to length one; a zero row is replaced by that of `instead`."""
    lengths = ordered_sum(rows.double().square()).sqrt()[:, None]
    return torch.where(lengths > 0, (rows.double() / lengths).float(), instead)
