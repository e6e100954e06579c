"""The l nearest centroids against a sort of all float64 distances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cluster.test_kmeans import distances, mixture
from tests.cluster.test_two_level import grouped
from trainer.cluster.search.assign import assign, prepare
from trainer.cluster.search.top import Nearest, nearest, nearest_two_level
from trainer.cluster.search.two_level import assign_two_level


def naive(points: Tensor, centroids: Tensor, count: int) -> Tensor:
    """A stable sort of all distances; copies (bit by bit) of an earlier one are no centroids."""
    everything, bits = distances(points, centroids), centroids.view(torch.int32)
    for column in range(1, len(centroids)):
        if (bits[:column] == bits[column]).all(1).any():
            everything[:, column] = torch.inf
    order = torch.sort(everything, dim=1, stable=True)
    ids = order.indices.masked_fill(order.values == torch.inf, -1)
    return torch.nn.functional.pad(ids, (0, count), value=-1)[:, :count]


@pytest.mark.heavy
@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(1, 40),
    clusters=st.integers(1, 90),
    dim=st.integers(1, 30),
    count=st.integers(1, 12),
    cells=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "integers", "copies", "offset", "huge"]),
    column_block=st.integers(1, 100),
    precision=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_nearest_in_order(
    num: int,
    clusters: int,
    dim: int,
    count: int,
    cells: int,
    seed: int,
    kind: str,
    column_block: int,
    precision: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num, dim, generator=generator)
    centroids = torch.randn(clusters, dim, generator=generator)
    if kind == "integers":
        points, centroids = points.round(), centroids.round()
    if kind == "huge":
        points, centroids = points * 1e25, centroids * 1e25
    if kind == "offset":
        points, centroids = 1000 + 1e-3 * points, 1000 + 1e-3 * centroids
    if kind == "copies":
        centroids = centroids[torch.randint(clusters, (clusters,), generator=generator)]
    table = prepare(centroids, precision=precision)
    expected = naive(points, centroids, count).tolist()
    found = nearest(points, table, count=count, column_block=column_block)
    assert found.ids.tolist() == expected
    every_cell = grouped(centroids, min(cells, clusters), probes=cells)
    assert nearest_two_level(points, every_cell, count=count).ids.tolist() == expected


def same(a: Nearest, b: Nearest) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.distances, b.distances)


def test_distances_and_the_first_of_the_list() -> None:
    points = mixture(300, 12, components=30, spread=0.3, seed=1)
    centroids = mixture(120, 12, components=30, spread=0.3, seed=1)
    found = nearest(points, prepare(centroids), count=5)
    assert torch.equal(found.ids[:, 0], assign(points, centroids))
    expected = distances(points, centroids).sort(1).values[:, :5].float()
    torch.testing.assert_close(found.distances, expected, rtol=1e-6, atol=0)
    cells = grouped(centroids, 10, probes=3)
    looked = nearest_two_level(points, cells, count=5)
    assert torch.equal(looked.ids[:, 0], assign_two_level(points, cells))
    assert (looked.ids == found.ids).float().mean() > 0.25


@pytest.mark.heavy
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_lists_do_not_depend_on_the_batch(rows: int) -> None:
    points = mixture(200, 20, components=30, spread=0.5, seed=2)
    centroids = mixture(90, 20, components=30, spread=0.4, seed=3)
    table, cells = prepare(centroids), grouped(centroids, 12, probes=3)
    exact, fast = nearest(points, table, count=4), nearest_two_level(points, cells, count=4)
    parts = points.split(rows)
    first = [nearest(part, table, count=4) for part in parts]
    second = [nearest_two_level(part, cells, count=4) for part in parts]
    for whole, pieces in ((exact, first), (fast, second)):
        joined = Nearest(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))
        assert same(whole, joined)


def test_fewer_centroids_than_asked_for() -> None:
    points = torch.randn(4, 3)
    centroids = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 0]])
    for found in (
        nearest(points, prepare(centroids), count=4),
        nearest_two_level(points, grouped(centroids, 2, probes=1), count=4),
    ):
        assert set(found.ids[:, 2:].flatten().tolist()) == {-1}
        assert found.distances[:, 3].isinf().all()
