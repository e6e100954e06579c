"""The plan's numbers against arithmetic done by hand."""

from __future__ import annotations

import pytest

from trainer.cluster.plan import plan
from trainer.cluster.problem import KMeansConfig
from trainer.errors import ConfigError


def test_a_million_centroids_on_eight_accelerators() -> None:
    config = KMeansConfig(clusters=1_000_000, iterations=19)
    found = plan(
        config, points=400_000_000, dim=768, ranks=8, point_bytes=0, peak_flops=989e12,
        share_of_peak=0.6,
    )  # fmt: skip
    assert found.flop_per_pass == pytest.approx(6.144e17)
    assert found.hours * 3600 / 20 == pytest.approx(129, rel=0.01)
    # sums and counts of all clusters, and the eighth that is left of the sums
    assert found.sums_bytes == 1_000_000 * 769 * 8 + 125_000 * 768 * 8
    assert found.centroid_bytes == 1_000_000 * 768 * (4 + 4)
    assert found.reduced_bytes == 7 * 125_000 * 768 * (8 + 4)
    assert (found.grid, found.exchanged_bytes) == ((8, 1), 0)
    assert found.total_bytes < 80 * 2**30
    assert "1e+06 scores" in str(found) or "1000000 scores" in str(found)


def test_ten_million_centroids_on_sixty_four_accelerators() -> None:
    config = KMeansConfig(clusters=10_000_000, iterations=19)
    found = plan(
        config, points=400_000_000, dim=768, ranks=64, point_bytes=2, peak_flops=989e12,
        share_of_peak=0.6,
    )  # fmt: skip
    assert found.grid == (8, 8)
    assert found.held == 1_250_000
    assert found.points_bytes == 6_250_000 * 768 * 2
    assert found.centroid_bytes + found.sums_bytes < 16.5 * 2**30
    assert found.exchanged_bytes == 7 * 6_250_000 * 768 * 4
    assert found.total_bytes < 40 * 2**30
    assert found.hours * 3600 / 20 == pytest.approx(162, rel=0.01)
    assert "grid 8 x 8: a point is scored by 8 of 64 ranks, each with 1250000" in str(found)
    all_of_it = config.model_copy(update={"grid": 1})
    whole = plan(all_of_it, points=400_000_000, dim=768, ranks=64, peak_flops=1.0)
    assert whole.total_bytes > 80 * 2**30
    two_level = config.model_copy(update={"assignment": "two_level"})
    with pytest.raises(ConfigError, match="two_level holds all 10000000 centroids"):
        plan(two_level, points=400_000_000, dim=768, ranks=64, peak_flops=1.0)


def test_two_level_scores_follow_the_root_of_k() -> None:
    config = KMeansConfig(clusters=1_000_000, assignment="two_level", probes=8)
    found = plan(config, points=4_000_000, dim=64, ranks=2, peak_flops=1e11)
    assert found.scores_per_point == 1000 + 8 * 1000
    assert found.points_bytes == 2_000_000 * 64 * 4
    assert found.hours > 0
    more = plan(config, points=8_000_000, dim=64, ranks=2, peak_flops=1e11)
    assert more.scratch_bytes == found.scratch_bytes


def test_fewer_points_than_clusters() -> None:
    with pytest.raises(ConfigError, match="10 clusters for 9 points"):
        plan(KMeansConfig(clusters=10), points=9, dim=2, ranks=1, peak_flops=1.0)
