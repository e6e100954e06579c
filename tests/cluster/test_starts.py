"""Starts of k-means: the same on any ranks, and as good as they should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.test_kmeans import mixture, naive_labels, shares
from tests.ranks import run_ranks
from trainer.cluster.duplicates import repeats, without_duplicates
from trainer.cluster.kmeans import KMeansConfig, cluster, kmeans
from trainer.cluster.points import Resident
from trainer.cluster.start.drawn import smallest_hashes
from trainer.cluster.start.hierarchical import divided
from trainer.cluster.start.kmeans_parallel import spread_out
from trainer.comm import Comm
from trainer.errors import ConfigError


def started(comm: Comm) -> dict[str, Any]:
    """Centroids before any update has changed much, and who is kept of duplicates."""
    points = mixture(900, 12, components=40, spread=0.2, seed=9)
    points[600:] = points[:300] + 1e-4 * points[300:600]
    rows = shares(900, comm.world_size)[comm.rank]
    found: dict[str, Any] = {}
    for start in ("parallel", "hierarchical"):
        for spherical in (False, True):
            config = KMeansConfig(clusters=50, iterations=1, start=start, spherical=spherical)
            result = kmeans(points[rows], rows, config, comm)
            found[f"{start} {spherical}"] = result.centroids.view(torch.int32).tolist()
    kept = without_duplicates(Resident(points[rows], rows), 0.999, comm, seed=3)
    found["kept"] = sorted(comm.gather_rows(kept.ids(0, len(kept))).tolist())
    return found


def test_starts_and_duplicates_are_the_same_on_any_ranks() -> None:
    alone = started(Comm.solo())
    for world_size in (2, 3):
        for rank in run_ranks(started, world_size):
            assert rank == alone
    assert set(alone["kept"]) >= set(range(600))
    assert len(alone["kept"]) == 600


@pytest.mark.heavy
def test_a_start_is_better_than_drawn_points() -> None:
    points = mixture(2000, 10, components=64, spread=0.02, seed=5)
    inertia = {
        start: kmeans(
            points,
            torch.arange(2000),
            KMeansConfig(clusters=64, iterations=1, start=start),
            Comm.solo(),
        ).inertia
        for start in ("sampled", "parallel", "hierarchical")
    }
    assert inertia["parallel"] < 0.5 * inertia["sampled"]
    assert inertia["hierarchical"] < 0.9 * inertia["sampled"]


@pytest.mark.heavy
def test_too_many_clusters_for_far_apart_points() -> None:
    points = torch.zeros(50_002, 1)
    config = KMeansConfig(clusters=50_001, iterations=1, start="parallel")
    with pytest.raises(ConfigError, match="at most 50000 clusters, not 50001"):
        kmeans(points, torch.arange(50_002), config, Comm.solo())


@pytest.mark.parametrize("start", ["parallel", "hierarchical"])
@pytest.mark.parametrize("clusters", [1, 2, 40])
def test_few_points_and_copies(start: str, clusters: int) -> None:
    points = mixture(10, 4, components=3, spread=0.2, seed=1).repeat(4, 1)
    config = KMeansConfig(clusters=clusters, iterations=2, start=start)
    found = kmeans(points, torch.arange(40), config, Comm.solo())
    assert found.labels.tolist() == naive_labels(points, found.centroids).tolist()
    assert int(found.counts.sum()) == 40


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_clusters_are_divided_over_cells(counts: list[int], seed: int) -> None:
    total = sum(counts)
    if total == 0:
        return
    clusters = 1 + seed % total
    found = divided(torch.tensor(counts), clusters).tolist()
    assert sum(found) == clusters
    for count, share in zip(counts, found, strict=True):
        assert share <= count
        assert abs(share - clusters * count / total) < 1.0


def test_spread_out_takes_one_of_each_heap() -> None:
    heaps = torch.tensor([[0.0, 0], [10, 0], [0, 10]]).repeat_interleave(20, 0)
    rows = heaps + 0.01 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    chosen = spread_out(rows, torch.ones(60, dtype=torch.int64), 3, seed=4)
    assert sorted((chosen // 20).tolist()) == [0, 1, 2]
    everything = spread_out(rows, torch.zeros(60, dtype=torch.int64), 60, seed=4)
    assert sorted(everything.tolist()) == list(range(60))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), wanted=st.integers(1, 45), seed=st.integers(0, 100))
def test_the_smallest_hashes_of_a_sort(count: int, wanted: int, seed: int) -> None:
    points = Resident(torch.zeros(count + 1, 1), torch.arange(count + 1) * 17)
    bits, places = smallest_hashes(points, wanted, seed, Comm.solo())
    whole = smallest_hashes(points, count + 1, seed, Comm.solo())
    order = torch.argsort(whole[0])[:wanted]
    assert sorted(places.tolist()) == sorted(whole[1][order].tolist())
    assert sorted(bits.tolist()) == sorted(whole[0][order].tolist())


def test_repeats_against_all_pairs() -> None:
    rows = mixture(1300, 6, components=9, spread=0.3, seed=7)
    near = (rows.double() @ rows.double().T >= 0.995).tril(-1).any(1)
    found = repeats(rows, 0.995)
    assert (found == near).float().mean() > 0.999
    assert 0 < int(found.sum()) < 1300


def test_faiss_takes_the_start_it_is_told() -> None:
    points = mixture(500, 8, components=16, spread=0.05, seed=2)
    config = KMeansConfig(clusters=16, iterations=1, start="parallel", backend="faiss")
    drawn = config.model_copy(update={"start": "sampled"})
    given, other = (
        cluster(Resident(points, torch.arange(500)), c, Comm.solo()).inertia
        for c in (config, drawn)
    )
    assert given < other
