"""Figures of quality against scikit-learn, and the same for every world size."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ranks import run_ranks
from trainer.cluster import quality
from trainer.cluster.quality import (
    adjusted_rand_index,
    balance,
    contingency,
    mean_squared_distance,
    normalized_mutual_information,
    repeated_agreement,
)
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels

SOLO = Comm.solo()


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 80),
    groups=st.integers(1, 12),
    others=st.integers(1, 12),
    noise=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
    at_once=st.sampled_from([3, 1 << 23]),
)
def test_agreement_equals_sklearn(
    count: int, groups: int, others: int, noise: float, seed: int, at_once: int
) -> None:
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(groups, (count,), generator=generator)
    b = torch.randint(others, (count,), generator=generator)
    b = torch.where(torch.rand(count, generator=generator) < noise, b, a) * 10**7
    with mock.patch.object(quality, "_PAIRS_AT_ONCE", at_once):
        nmi = normalized_mutual_information(a, b, SOLO)
        assert contingency(a, b, SOLO).pairs.samples == count
    assert nmi == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-9)
    assert adjusted_rand_index(a, b, SOLO) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    assert adjusted_rand_index(b, a, SOLO) == adjusted_rand_index(a, b, SOLO)
    names = torch.randperm(groups, generator=generator)
    assert normalized_mutual_information(a, names[a], SOLO) == pytest.approx(1.0, abs=1e-12)
    assert adjusted_rand_index(a, names[a], SOLO) == 1.0


def test_unknown_labels_are_left_out() -> None:
    a = torch.tensor([0, 0, 1, 1, -1, 2])
    b = torch.tensor([5, 5, 7, 7, 7, -1])
    assert normalized_mutual_information(a, b, SOLO) == pytest.approx(1.0)
    assert [x.tolist() for x in contingency(a, b, SOLO).pairs] == [[2], [2]]
    nobody = torch.full((3,), -1)
    assert math.isnan(normalized_mutual_information(nobody, nobody, SOLO))
    assert math.isnan(adjusted_rand_index(nobody, nobody, SOLO))


def test_repeated_samples_between_two_episodes() -> None:
    before = ClusterLabels(torch.arange(50), torch.arange(50) % 5)
    ids = torch.arange(30, 90)
    same = (ids % 5 + 2) % 5
    assert repeated_agreement(before, ids, same, SOLO) == pytest.approx(1.0)
    assert repeated_agreement(before, ids, torch.zeros_like(ids), SOLO) == pytest.approx(0.0)


def test_balance_by_hand() -> None:
    figures = balance(torch.tensor([0, 1, 3, 0, 4]))
    assert figures["empty"] == 2
    assert figures["singletons"] == 1
    assert figures["largest"] == 4
    assert figures["imbalance"] == pytest.approx(5 * (1 + 9 + 16) / 64)
    shares = [1 / 8, 3 / 8, 4 / 8]
    assert figures["entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert balance(torch.full((7,), 3))["imbalance"] == pytest.approx(1.0)
    assert balance(torch.full((7,), 3))["entropy"] == pytest.approx(math.log(7))


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(20, (500,), generator=generator)
    b = torch.where(torch.rand(500, generator=generator) < 0.4, a, a.roll(1))
    return a, b, torch.randn(500, 6, generator=generator)


def figures_of_shares(comm: Comm) -> list[float]:
    """Rank 1 holds no sample."""
    a, b, points = _case()
    owner = torch.randint(comm.world_size, (500,), generator=torch.Generator().manual_seed(1))
    mine = torch.where(owner == 1, 0, owner) == comm.rank
    return [
        normalized_mutual_information(a[mine], b[mine], comm),
        adjusted_rand_index(a[mine], b[mine], comm),
        mean_squared_distance(points[mine], points[:20], a[mine], comm),
    ]


def test_same_figures_for_every_world_size() -> None:
    alone = figures_of_shares(SOLO)
    a, _, points = _case()
    expected = (points.double() - points[:20][a].double()).square().sum(1).mean()
    assert alone[2] == pytest.approx(float(expected))
    for rank in run_ranks(figures_of_shares, 3):
        assert rank[:2] == alone[:2]
        assert rank[2] == pytest.approx(alone[2], rel=1e-12)
