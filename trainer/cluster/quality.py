"""How good a clustering is: agreement with another grouping, and balance.

Everything is computed from integer counts over all ranks, so the figures are equal for every
world size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from trainer.cluster.search.assign import pair_distances
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels


class Contingency(NamedTuple):
    """How many samples have label a here and label b there; only pairs that occur."""

    pairs: Int64[Tensor, " p"]
    """n_ab, in order of (a, b)."""
    first: Int64[Tensor, " p"]
    """a of each pair, as its rank among the labels that occur."""
    second: Int64[Tensor, " p"]
    first_counts: Int64[Tensor, " r"]
    """n_a."""
    second_counts: Int64[Tensor, " c"]


def contingency(a: Int[Tensor, " n"], b: Int[Tensor, " n"], comm: Comm) -> Contingency:
    """Joint counts of two labellings of the same samples, over all ranks.

    `a` and `b` are this rank's samples; those with a negative label (unknown) in either are left
    out. Every rank gathers the pairs that occur, at most one per sample: never rows x columns.
    """
    known = (a >= 0) & (b >= 0)
    local, counts = torch.unique(
        torch.stack([a[known].long(), b[known].long()], 1), dim=0, return_counts=True
    )
    rows, weights = comm.gather_rows(local), comm.gather_rows(counts)
    merged, place = torch.unique(rows, dim=0, return_inverse=True)
    pairs = weights.new_zeros(merged.shape[0]).index_add_(0, place, weights)
    first, first_counts = _margin(merged[:, 0], pairs)
    second, second_counts = _margin(merged[:, 1], pairs)
    return Contingency(pairs, first, second, first_counts, second_counts)


def normalized_mutual_information(a: Int[Tensor, " n"], b: Int[Tensor, " n"], comm: Comm) -> float:
    """I(a; b) / ((H(a) + H(b)) / 2) over all ranks' samples: 1 for the same grouping.

    1 if neither divides the samples; 0 if nothing is shared. Unknown (negative) labels are left
    out; NaN if no sample is left.
    """
    table = contingency(a, b, comm)
    total = int(table.pairs.sum())
    if total == 0:
        return math.nan
    entropies = _entropy(table.first_counts) + _entropy(table.second_counts)
    information = entropies - _entropy(table.pairs)
    if entropies == 0.0:
        return 1.0
    return min(max(2.0 * information / entropies, 0.0), 1.0)


def adjusted_rand_index(a: Int[Tensor, " n"], b: Int[Tensor, " n"], comm: Comm) -> float:
    """Share of sample pairs on which two groupings agree, corrected for chance (Hubert, Arabie
    1985): 1 for the same grouping, 0 in expectation for independent ones.

    Exact integers up to the last division. NaN if no sample has both labels.
    """
    table = contingency(a, b, comm)
    total = int(table.pairs.sum())
    if total == 0:
        return math.nan
    together = _num_pairs(table.pairs)
    first, second = _num_pairs(table.first_counts), _num_pairs(table.second_counts)
    everything = total * (total - 1) // 2
    # numerator and denominator both times 2 * everything, to stay in integers
    excess = 2 * (together * everything - first * second)
    possible = (first + second) * everything - 2 * first * second
    return 1.0 if possible == 0 else excess / possible


def repeated_agreement(
    before: ClusterLabels, ids: Int64[Tensor, " n"], labels: Int[Tensor, " n"], comm: Comm
) -> float:
    """NMI between an earlier clustering and this one, on the samples that are in both."""
    return normalized_mutual_information(before.of(ids), labels, comm)


def balance(counts: Int[Tensor, " k"]) -> dict[str, float]:
    """How evenly samples spread over K clusters, from the global counts.

    empty, singletons: clusters of 0 and 1 samples. imbalance: K sum_k (n_k / N)^2, 1 if all are
    equal, K if one holds everything. entropy: of n_k / N in nats, at most log K. largest: samples.
    """
    counts = counts.long()
    total = max(int(counts.sum()), 1)
    shares = counts.double() / total
    return {
        "empty": float((counts == 0).sum()),
        "singletons": float((counts == 1).sum()),
        "imbalance": float(counts.numel() * shares.square().sum()),
        "entropy": _entropy(counts),
        "largest": float(counts.max()),
    }


def size_quantiles(counts: Int[Tensor, " k"]) -> dict[str, float]:
    """Sizes of the clusters at some places of their order: samples."""
    ordered = torch.sort(counts.long()).values
    places = {"size_p01": 0.01, "size_p25": 0.25, "size_p50": 0.5, "size_p75": 0.75}
    places["size_p99"] = 0.99
    last = ordered.numel() - 1
    return {name: float(ordered[round(share * last)]) for name, share in places.items()}


def mean_squared_distance(
    points: Float[Tensor, "n d"],
    centroids: Float[Tensor, "k d"],
    labels: Int64[Tensor, " n"],
    comm: Comm,
) -> float:
    """Mean over all ranks' points of |x - c_label|^2, in float64."""
    total = points.new_zeros(1, dtype=torch.float64)
    for rows, chosen in zip(points.split(4096), labels.split(4096), strict=True):
        total += pair_distances(rows, centroids[chosen]).sum()
    count = torch.tensor([points.shape[0]], dtype=torch.float64, device=points.device)
    return float(comm.sum(total) / comm.sum(count))


def _margin(labels: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Compact ids of the labels that occur, and their counts."""
    values, place = torch.unique(labels, return_inverse=True)
    return place, pairs.new_zeros(values.shape[0]).index_add_(0, place, pairs)


def _entropy(counts: Tensor) -> float:
    """-sum p log p in nats, from counts."""
    positive = counts[counts > 0].double()
    total = positive.sum()
    if positive.numel() <= 1:
        return 0.0
    return float(total.log() - (positive * positive.log()).sum() / total)


def _num_pairs(counts: Tensor) -> int:
    """Unordered pairs of samples that share a group."""
    return int((counts * (counts - 1) // 2).sum())
