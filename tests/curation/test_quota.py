"""Quotas: exact counts, nesting, and water that fills what small clusters can't give."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.curation.policy import PRESETS, Policy, first_of_each, member_order, read_policy
from trainer.curation.quota import filled_quotas, kept_shares, merged_clusters, quotas
from trainer.errors import ConfigError

COUNTS = np.array([1, 3, 7, 40, 500, 0, 12, 2000])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_every_cluster_gives_its_share_rounded_and_one_at_least(share):
    kept = quotas(COUNTS, share)
    expected = [max(1, round(share * n)) if n else 0 for n in COUNTS.tolist()]
    assert kept.tolist() == expected
    large = COUNTS * share >= 0.5
    assert (np.abs(kept[large] / COUNTS[large] - share) <= 1 / (2 * COUNTS[large])).all()


def test_a_quarter_of_the_published_corpus():
    assert int(2_690_757 * 0.25) == 672_689
    assert abs(int(quotas(np.array([2_690_757]), 0.25)[0]) - 672_689) <= 1


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9])
def test_water_filling_meets_the_target_where_clamping_alone_falls_short(alpha):
    target = 0.6 * COUNTS.sum()
    filled = filled_quotas(COUNTS, target, alpha=alpha)
    assert filled.sum() == pytest.approx(target, rel=1e-9)
    assert (filled <= COUNTS).all()
    rates = kept_shares(COUNTS, 0.6, alpha=alpha)
    assert (rates <= 1).all()
    assert (rates * COUNTS).sum() == pytest.approx(target, rel=1e-9)
    powers = np.where(COUNTS > 0, np.maximum(COUNTS, 1.0) ** alpha, 0.0)
    naive = np.minimum(COUNTS, target * powers / powers.sum())
    assert naive.sum() < target
    free = filled < COUNTS
    ratio = filled[free] / powers[free]
    np.testing.assert_allclose(ratio[powers[free] > 0], ratio[powers[free] > 0][0])


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_a_larger_share_never_takes_from_a_cluster(alpha):
    before = np.zeros(len(COUNTS))
    for share in np.linspace(0.02, 1.0, 50):
        kept = quotas(COUNTS, float(share), alpha=alpha)
        assert (kept >= before).all()
        before = kept
    assert before.tolist() == COUNTS.tolist()


@pytest.mark.parametrize("rule", ["uniform", "topscore", "near", "far", "score_weighted"])
def test_a_smaller_selection_lies_inside_a_larger_one_and_no_order_of_samples_matters(rule):
    draw = np.random.default_rng(0)
    ids = draw.permutation(10_000).astype(np.int64)
    clusters, scores = ids % 7, np.cos(ids * 0.37).round(1)
    distances = np.sin(ids * 0.11).round(1) + 1

    def kept(share: float, places: np.ndarray) -> set[int]:
        order = member_order(rule, ids[places], scores[places], distances[places], seed=4)
        most = quotas(np.bincount(clusters), share)
        chosen = first_of_each(clusters[places], order, ids[places], most)
        return set(ids[places][chosen].tolist())

    straight = np.arange(len(ids))
    small, large = kept(0.1, straight), kept(0.3, straight)
    assert small < large
    assert kept(0.3, draw.permutation(len(ids))) == large
    inside = np.isin(ids, list(large))
    if rule == "topscore":
        assert scores[inside].min() >= scores[~inside].max() - 0.1
    if rule == "near":
        assert distances[inside].max() <= distances[~inside].min() + 0.1
    if rule == "far":
        assert distances[inside].min() >= distances[~inside].max() - 0.1
    if rule == "score_weighted":
        assert scores[inside].mean() > scores.mean() + 0.1


def test_centroids_that_lie_near_each_other_over_others_between_are_one():
    angles = np.radians([0, 20, 40, 60, 180])
    centroids = np.stack([np.cos(angles), np.sin(angles)], 1) * 3.0
    assert merged_clusters(centroids, 0.9).tolist() == [0, 0, 0, 0, 1]
    assert merged_clusters(centroids, 0.99).tolist() == [0, 1, 2, 3, 4]


def test_presets_are_policies_and_senseless_ones_are_refused():
    for preset in PRESETS.values():
        assert Policy.model_validate(preset).clusters
    assert read_policy(PRESETS["dynamics"], ["share=0.3"]).share == 0.3
    for wrong in (["rule=far"], ["rule=balance"], ["threshold=3"], ["rule=near", "resample=true"]):
        with pytest.raises(ConfigError, match="policy"):
            read_policy({}, wrong)
