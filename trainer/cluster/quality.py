"""How good a clustering is: agreement with another grouping, and balance.

Everything is computed from integer counts over all ranks, so the figures are equal for every
world size.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from trainer.cluster.search.assign import pair_distances
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels

_PAIRS_AT_ONCE = 1 << 23


class Sizes(NamedTuple):
    """How many groups there are of each size; groups of one size count alike in every figure."""

    values: Int64[Tensor, " s"]
    """Ascending sizes: samples."""
    times: Int64[Tensor, " s"]
    """Groups of that size."""

    @classmethod
    def of(cls, counts: Int64[Tensor, " n"]) -> Sizes:
        return cls(*torch.unique(counts[counts > 0], return_counts=True))

    def __add__(self, other: object) -> Sizes:
        assert isinstance(other, Sizes)
        both = (torch.cat(columns) for columns in zip(self, other, strict=True))
        return Sizes(*_added(*both))

    @property
    def samples(self) -> int:
        return int((self.values * self.times).sum())

    @property
    def num_pairs(self) -> int:
        """Unordered pairs of samples that share a group."""
        return int((self.times * (self.values * (self.values - 1) // 2)).sum())

    @property
    def entropy(self) -> float:
        """-sum p log p in nats, over the groups' shares of the samples."""
        if int(self.times.sum()) <= 1:
            return 0.0
        sizes = self.values.double()
        total = (sizes * self.times).sum()
        return float(total.log() - (sizes * sizes.log() * self.times).sum() / total)


class Contingency(NamedTuple):
    """How many samples two labellings of the same samples have together: sizes alone."""

    pairs: Sizes
    """Of the groups of samples with label a here and label b there."""
    first: Sizes
    """Of those with label a."""
    second: Sizes


def contingency(a: Int[Tensor, " n"], b: Int[Tensor, " n"], comm: Comm) -> Contingency:
    """Joint counts of two labellings of the same samples, over all ranks.

    `a` and `b` are this rank's samples; those with a negative label (unknown) in either are left
    out. Range after range of the labels a, so that some millions of pairs are on a rank at once:
    never all samples, never rows x columns.
    """
    known = (a >= 0) & (b >= 0)
    own, counts = torch.unique(
        torch.stack([a[known].long(), b[known].long()], 1), dim=0, return_counts=True
    )
    told = torch.tensor([len(own)], device=own.device)
    ranges = max(-(-int(comm.sum(told)) // _PAIRS_AT_ONCE), 1)
    last = int(comm.max(own[:, 0].max() if len(own) else own.new_zeros(())))
    borders = torch.arange(1, ranges, device=own.device) * (last + 1) // ranges
    parts = torch.searchsorted(own[:, 0].contiguous(), borders).tolist()
    nothing = own.new_zeros(0)
    second = (nothing, nothing)
    pairs = first = Sizes(nothing, nothing)
    for begin, end in pairwise([0, *parts, len(own)]):
        rows, weights = comm.gather_rows(own[begin:end]), comm.gather_rows(counts[begin:end])
        merged, place = torch.unique(rows, dim=0, return_inverse=True)
        found = weights.new_zeros(len(merged)).index_add_(0, place, weights)
        pairs += Sizes.of(found)
        first += Sizes.of(_added(merged[:, 0], found)[1])
        second = _added(torch.cat([second[0], merged[:, 1]]), torch.cat([second[1], found]))
    return Contingency(pairs, first, Sizes.of(second[1]))


def normalized_mutual_information(a: Int[Tensor, " n"], b: Int[Tensor, " n"], comm: Comm) -> float:
    """I(a; b) / ((H(a) + H(b)) / 2) over all ranks' samples: 1 for the same grouping.

    1 if neither divides the samples; 0 if nothing is shared. Unknown (negative) labels are left
    out; NaN if no sample is left.
    """
    table = contingency(a, b, comm)
    if table.pairs.samples == 0:
        return math.nan
    entropies = table.first.entropy + table.second.entropy
    information = entropies - table.pairs.entropy
    if entropies == 0.0:
        return 1.0
    return min(max(2.0 * information / entropies, 0.0), 1.0)


def adjusted_rand_index(a: Int[Tensor, " n"], b: Int[Tensor, " n"], comm: Comm) -> float:
    """Share of sample pairs on which two groupings agree, corrected for chance (Hubert, Arabie
    1985): 1 for the same grouping, 0 in expectation for independent ones.

    Exact integers up to the last division. NaN if no sample has both labels.
    """
    table = contingency(a, b, comm)
    total = table.pairs.samples
    if total == 0:
        return math.nan
    together = table.pairs.num_pairs
    first, second = table.first.num_pairs, table.second.num_pairs
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
        "entropy": Sizes.of(counts).entropy,
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


def _added(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct keys, ascending, and the sum of the counts of each."""
    values, place = torch.unique(keys, return_inverse=True)
    return values, counts.new_zeros(len(values)).index_add_(0, place, counts)
