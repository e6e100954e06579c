"""Bags of codes do not see in which order a codebook is written; raw numbers do."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from trainer.cluster.kmeans import cluster
from trainer.cluster.points import Resident
from trainer.cluster.problem import KMeansConfig
from trainer.comm import Comm
from trainer.curation.codes import bag_of_codes

CODES, PATCHES, CLASSES = 64, 40, 4


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Of each class some codes, at no fixed place."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % CLASSES
    own = torch.randperm(CODES, generator=draw).view(CLASSES, -1)
    picked = torch.randint(own.shape[1], (len(labels), PATCHES), generator=draw)
    return own[labels[:, None], picked], labels


def groups(rows: torch.Tensor) -> torch.Tensor:
    """Which samples are together, of a k-means."""
    config = KMeansConfig(clusters=CLASSES, iterations=20, restarts=4)
    found = cluster(Resident(rows, torch.arange(len(rows))), config, Comm.solo()).labels
    return found[:, None] == found[None]


@pytest.mark.heavy
def test_relabelled_codes_leave_the_bags_clusters_and_change_those_of_raw_numbers():
    codes, labels = images()
    renamed = torch.randperm(CODES, generator=torch.Generator().manual_seed(1))[codes]
    bags, others = bag_of_codes(codes, CODES), bag_of_codes(renamed, CODES)
    torch.testing.assert_close(bags @ bags.T, others @ others.T)
    assert torch.equal(groups(bags), labels[:, None] == labels[None])
    assert torch.equal(groups(others), groups(bags))
    raw = [normalize(each.float() - each.float().mean(0), dim=1) for each in (codes, renamed)]
    assert not torch.equal(groups(raw[0]), groups(raw[1]))


def test_the_cosine_of_two_bags_is_the_overlap_of_their_histograms():
    codes, _ = images()
    bags = bag_of_codes(codes, CODES)
    shares = torch.stack([torch.bincount(row, minlength=CODES) / PATCHES for row in codes[:5]])
    expected = (shares[:, None] * shares[None]).sqrt().sum(2)
    torch.testing.assert_close(bags[:5] @ bags[:5].T, expected)
