"""Two-level assignment: exact within the cells looked into, and the same for every split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cluster.test_kmeans import distances, mixture, shares
from tests.launches import launches_of
from tests.ranks import run_ranks
from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.cluster.search.assign import assign
from trainer.cluster.search.two_level import (
    Cells,
    assign_two_level,
    group_into_cells,
    probed,
    rows_at_once,
)
from trainer.comm import Comm


def grouped(centroids: Tensor, cells: int, *, probes: int) -> Cells:
    centres = centroids[:cells]
    return group_into_cells(centroids, centres, assign(centroids, centres), probes=probes)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    clusters=st.integers(1, 60),
    dim=st.integers(1, 30),
    cells=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "integers", "copies", "offset", "huge"]),
)
def test_looking_into_all_cells_is_exact(
    count: int, clusters: int, dim: int, cells: int, seed: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, dim, generator=generator)
    centroids = torch.randn(clusters, dim, generator=generator)
    if kind == "integers":
        points, centroids = points.round(), centroids.round()
    if kind == "huge":
        points, centroids = points * 1e25, centroids * 1e25
    if kind == "copies":
        centroids = centroids[torch.randint(clusters, (clusters,), generator=generator)]
    if kind == "offset":
        points, centroids = 1000 + 1e-3 * points, 1000 + 1e-3 * centroids
    everything = grouped(centroids, min(cells, clusters), probes=cells)
    assert torch.equal(assign_two_level(points, everything), assign(points, centroids))


def test_a_label_is_the_nearest_of_the_cells_looked_into() -> None:
    points = mixture(500, 12, components=30, spread=0.3, seed=1)
    centroids = mixture(120, 12, components=30, spread=0.3, seed=1)
    cells = grouped(centroids, 10, probes=1)
    labels = assign_two_level(points, cells)
    cell_of = assign(centroids, centroids[:10])
    home = cell_of[labels]
    outside = cell_of[None] != home[:, None]
    nearest = distances(points, centroids).masked_fill(outside, torch.inf).argmin(1)
    assert torch.equal(labels, nearest)
    exact = assign(points, centroids)
    recall = [
        float((assign_two_level(points, wider) == exact).float().mean())
        for wider in (grouped(centroids, 10, probes=probes) for probes in (1, 3, 10))
    ]
    assert recall[0] < recall[1] <= recall[2] == 1.0
    assert recall[0] > 0.5


def test_labels_do_not_depend_on_the_batch() -> None:
    points = mixture(700, 20, components=30, spread=0.5, seed=2)
    cells = grouped(mixture(90, 20, components=30, spread=0.4, seed=3), 12, probes=3)
    whole = assign_two_level(points, cells)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign_two_level(points[order], cells), whole[order])
    pieces = torch.cat([assign_two_level(part, cells) for part in points.split(37)])
    assert torch.equal(pieces, whole)


def test_launches_are_of_cells_and_blocks_not_of_points() -> None:
    """So a GPU takes as many points at once as fit: some thirty times a processor's."""
    cells = grouped(mixture(90, 20, components=30, spread=0.4, seed=3), 12, probes=3)
    points = mixture(800, 20, components=30, spread=0.5, seed=2)
    at_once = launches_of(lambda: assign_two_level(points, cells))
    half = launches_of(lambda: assign_two_level(points[:400], cells))
    assert at_once <= 1.2 * half
    for dim in (128, 768):
        assert rows_at_once(dim, "cuda") >= 4 * rows_at_once(dim)
    assert rows_at_once(768, "cuda") == 32 * (1 << 22) // 768


@pytest.mark.heavy
@pytest.mark.parametrize("clusters", [255, 256, 700, 1300])
def test_wide_cells(clusters: int) -> None:
    """Columns are compared in groups, and some are left over."""
    generator = torch.Generator().manual_seed(clusters)
    centroids = torch.randn(clusters, 6, generator=generator).round(decimals=1)
    points = torch.cat([centroids, torch.randn(300, 6, generator=generator)])
    points[-1] = 0.5 * (centroids[0] + centroids[-1])
    one_cell = grouped(centroids, 1, probes=1)
    assert torch.equal(assign_two_level(points, one_cell), distances(points, centroids).argmin(1))


def looked_into(points: Tensor, cells: Cells) -> Tensor:
    """[points, cells] who looks where, from the pairs."""
    rows, members = probed(points - cells.table.origin, cells)
    found = torch.zeros(len(points), len(members), dtype=torch.bool)
    found[rows, torch.arange(len(members)).repeat_interleave(torch.tensor(members))] = True
    return found


def test_a_point_looks_into_its_nearest_cell_and_those_about_as_near() -> None:
    centroids = mixture(600, 12, components=60, spread=0.3, seed=1)
    cells = grouped(centroids, 20, probes=3)
    assert looked_into(centroids, cells).sum() == pytest.approx(3 * 600, abs=5)
    points = mixture(500, 12, components=60, spread=0.5, seed=1)
    inside = looked_into(points, cells)
    apart = distances(points, cells.coarse * cells.coarse_scale + cells.table.origin)
    assert inside[torch.arange(500), apart.argmin(1)].float().mean() > 0.98
    furthest_in = apart.masked_fill(~inside, -torch.inf).amax(1)
    nearest_out = apart.masked_fill(inside, torch.inf).amin(1)
    assert (furthest_in < nearest_out).float().mean() > 0.95
    counts = inside.sum(1)
    assert len(counts.unique()) > 3
    assert counts.min() >= 1
    everywhere = torch.zeros(1, 12) + cells.table.origin
    flat = cells._replace(coarse_offsets=torch.arange(20.0), reach=100.0)
    assert looked_into(everywhere, flat).nonzero()[:, 1].tolist() == list(range(8, 20))


def test_too_many_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2096 dims, not 2100"):
        grouped(torch.randn(4, 2100), 2, probes=1)


def clustered(comm: Comm) -> list[object]:
    points = mixture(900, 16, components=40, spread=0.3, seed=4)
    rows = shares(900, comm.world_size)[comm.rank]
    config = KMeansConfig(clusters=80, iterations=5, assignment="two_level", probes=3)
    found = kmeans(points[rows], rows, config, comm)
    labels = dict(zip(rows.tolist(), found.labels.tolist(), strict=True))
    return [labels, found.centroids.view(torch.int32).tolist(), found.objective, found.inertia]


def test_same_bits_for_every_world_size() -> None:
    alone = clustered(Comm.solo())
    points = mixture(900, 16, components=40, spread=0.3, seed=4)
    ids = torch.arange(900)
    exact = kmeans(points, ids, KMeansConfig(clusters=80, iterations=5), Comm.solo())
    assert isinstance(alone[3], float)
    assert exact.inertia * 0.97 < alone[3] < exact.inertia * 1.03
    for world_size in (2, 3):
        ranks = run_ranks(clustered, world_size)
        assert all(rank[1:] == alone[1:] for rank in ranks)
        assert {i: k for rank in ranks for i, k in rank[0].items()} == alone[0]
