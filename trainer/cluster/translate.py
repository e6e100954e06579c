"""Prototypical back translation: groups found in one space, averaged in another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import DataError

BLOCK_ELEMENTS = 1 << 26
"""Sums that exist at a time on one rank (float64: 512 MB)."""


class GroupMeans(NamedTuple):
    """The groups that this rank owns: global rows `comm.row_range(num_groups)`."""

    rows: Float[Tensor, "local dim"]
    """Mean of each group's features, not normalised; zero where the group is empty."""
    counts: Int64[Tensor, " local"]
    """Members of each group over all ranks."""


def group_means(
    features: Float[Tensor, "samples dim"],
    labels: Int64[Tensor, " samples"],
    *,
    num_groups: int,
    comm: Comm,
) -> GroupMeans:
    """Mean feature of each group over all ranks' samples, rows split over the ranks.

    Equals `features[labels == k].mean(0)` for every k of this rank's rows. Samples are this
    rank's own, any number of them; a negative label belongs to no group. Sums are float64, so
    the number of ranks changes nothing that float32 could show. Raises DataError on every rank
    where a label is `num_groups` or more.

    ProtoCLIP, arXiv 2206.10996, section on prototypical back translation.
    """
    _check_labels(labels, num_groups=num_groups, comm=comm)
    size, dim = -(-num_groups // comm.world_size), features.shape[1]
    block = max(1, min(size, BLOCK_ELEMENTS // (comm.world_size * (dim + 1))))
    kept = labels >= 0
    sums = [
        _block_sums(features[kept], labels[kept], first=first, block=block, size=size, comm=comm)
        for first in range(0, size, block)
    ]
    first_row, last_row = comm.row_range(num_groups)
    table = torch.cat(sums)[: last_row - first_row]
    counts = table[:, -1].round().to(torch.int64)
    means = table[:, :-1] / counts.clamp_min(1)[:, None]
    return GroupMeans(means.to(torch.promote_types(features.dtype, torch.float32)), counts)


def _block_sums(
    features: Tensor, labels: Tensor, *, first: int, block: int, size: int, comm: Comm
) -> Tensor:
    """Sums and counts [block, dim + 1] of the groups `first` to `first + block` of each shard."""
    offset = labels % size - first
    inside = (offset >= 0) & (offset < block)
    index = (labels // size * block + offset)[inside]
    rows = features[inside].to(torch.float64)
    sums = rows.new_zeros(comm.world_size * block, features.shape[1] + 1)
    sums.index_add_(0, index, torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1))
    return comm.reduce_scatter(sums)


def _check_labels(labels: Tensor, *, num_groups: int, comm: Comm) -> None:
    highest = labels.max() if labels.numel() else labels.new_tensor(-1)
    highest_label = int(comm.max(highest))
    if highest_label >= num_groups:
        raise DataError(
            f"a label is {highest_label} but there are only {num_groups} groups, counted from 0; "
            "the labels belong to another clustering"
        )
