"""Centroids on a grid of ranks: the bits of one rank that holds them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cluster.test_kmeans import data_sets, mixture, naive_labels, shares
from tests.cluster.test_top import naive
from tests.ranks import run_ranks
from trainer.cluster.grid import Grid
from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.cluster.layout import laid_out, ranks_per_row
from trainer.cluster.ranks.together import rounds
from trainer.cluster.search.assign import assign_block, prepare
from trainer.cluster.search.top import nearest
from trainer.cluster.update import refilled, splits_of
from trainer.comm import Comm
from trainer.errors import ConfigError


def problems() -> dict[str, tuple[Tensor, Tensor, KMeansConfig]]:
    """Points, ids, configuration."""
    normal = mixture(300, 11, components=23, spread=0.4, seed=3)
    found = {
        name: (points, torch.arange(len(points)), config)
        for name, (points, config) in data_sets().items()
        if name not in ("faiss", "mixture", "early stop")
    }
    for start in ("parallel", "hierarchical"):
        config = KMeansConfig(clusters=19, iterations=3, start=start)
        found[start] = (normal, torch.arange(300), config)
    found["ids twice"] = (normal, torch.arange(300) // 3, KMeansConfig(clusters=90, iterations=3))
    found["overflow"] = (normal * 1e25, torch.arange(300), KMeansConfig(clusters=9, iterations=2))
    return found


def clustered(comm: Comm, grid: int) -> dict[str, list[Any]]:
    results: dict[str, list[Any]] = {}
    for name, (points, ids, config) in problems().items():
        rows = shares(len(points), comm.world_size)[comm.rank]
        precision = ["auto", "float32", "bfloat16"][comm.rank % 3]
        changed = {
            "row_block": 150 * comm.world_size,
            "precision": precision,
            "grid": grid,
            "iterations": min(config.iterations, 3),
            "restarts": min(config.restarts, 2),
        }
        asked = config.model_copy(update=changed)
        found = kmeans(points[rows], ids[rows], asked, comm)
        results[name] = [
            dict(zip(rows.tolist(), found.labels.tolist(), strict=True)),
            found.centroids.view(torch.int32).tolist(),
            found.counts.tolist(),
            [value.hex() for value in found.objective],
            [found.repaired, found.inertia.hex()],
        ]
    return results


@pytest.fixture(scope="module")
def single() -> dict[str, list[Any]]:
    return clustered(Comm.solo(), 1)


@pytest.mark.parametrize(("world_size", "grid"), [(2, 2), (3, 3), (4, 2), (4, 4)])
def test_the_same_bits_on_any_grid(
    world_size: int, grid: int, single: dict[str, list[Any]]
) -> None:
    assert single["copies"][4][0] > 0, "one of the cases must refill empty clusters"
    ranks = run_ranks(clustered, world_size, grid)
    for name, expected in single.items():
        assert {i: k for rank in ranks for i, k in rank[name][0].items()} == expected[0], name
        assert all(rank[name][1:] == expected[1:] for rank in ranks), name


# -- the pieces -------------------------------------------------------------------------------


def searched(comm: Comm) -> list[Any]:
    """Labels and lists among slices; the centroids have copies on other ranks."""
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(50, 6, generator=generator)
    centroids = centroids[torch.randint(50, (90,), generator=generator)]
    points = torch.randn(40, 6, generator=generator)
    results: list[Any] = []
    for some in (centroids, centroids[:3]):
        grid = Grid(len(some), comm, Comm.solo())
        for precision in (torch.float32, torch.bfloat16):
            table = prepare(some[grid.held], precision=precision, scorers=comm)
            results.append(assign_block(points, table, column_block=32).tolist())
            found = nearest(points, table, count=4)
            results += [found.ids.tolist(), found.distances.tolist()]
    return results


def test_slices_are_searched_like_the_whole_table() -> None:
    alone = searched(Comm.solo())
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(50, 6, generator=generator)
    centroids = centroids[torch.randint(50, (90,), generator=generator)]
    points = torch.randn(40, 6, generator=generator)
    assert alone[0] == naive_labels(points, centroids).tolist()
    assert alone[1] == naive(points, centroids, 4).tolist()
    for found in run_ranks(searched, 4):
        assert found == alone


def given_up(comm: Comm) -> list[int]:
    """Rank 1 has two blocks more than rank 0, and gives up after the third."""
    blocks = [(slice(i, i + 1), torch.full((1, 2), float(i))) for i in range(2 + 2 * comm.rank)]
    seen = []
    for step in rounds(iter(blocks), 2, comm):
        seen.append(len(step.points))
        if comm.rank == 1 and len(seen) == 3:
            break
    return seen


def test_a_group_goes_on_until_its_last_block_and_ends_with_the_first_that_fails() -> None:
    assert run_ranks(given_up, 2) == [[2, 2, 1], [2, 2, 1]]


def places(comm: Comm) -> list[Any]:
    config = KMeansConfig(clusters=10, grid=2)
    grid = laid_out(config, 3, comm)
    held = torch.arange(10)[grid.held]
    return [held.tolist(), held[grid.owned_here].tolist(), grid.padded, grid.whole(held).tolist()]


def test_every_row_is_owned_once() -> None:
    ranks = run_ranks(places, 4)
    assert [rank[0] for rank in ranks] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2
    assert [rank[1] for rank in ranks] == [[0, 1, 2], [5, 6, 7], [3, 4], [8, 9]]
    assert all(rank[2:] == [6, list(range(10))] for rank in ranks)


def test_the_grid_is_the_smallest_that_fits_the_budget() -> None:
    gib = 10_000_000 * 768 * 16 / 2**30
    config = KMeansConfig(clusters=10_000_000)
    for budget, size in ((1.01 * gib, 1), (0.99 * gib, 2), (0.3 * gib, 4), (gib / 7.9, 8)):
        asked = config.model_copy(update={"centroid_gib": budget})
        assert ranks_per_row(asked, dim=768, ranks=64) == size
    assert ranks_per_row(config, dim=768, ranks=64) == 8
    assert ranks_per_row(config, dim=768, ranks=3) == 3, "as far as it goes"
    assert ranks_per_row(KMeansConfig(clusters=1_000_000), dim=768, ranks=64) == 1
    with pytest.raises(ConfigError, match=r"grid: 3 does not divide 4 ranks; use one of \[1, 2, 4"):
        ranks_per_row(KMeansConfig(clusters=9, grid=3), dim=1, ranks=4)


@pytest.mark.parametrize("options", [{"assignment": "two_level"}, {"backend": "faiss"}])
def test_searches_that_need_the_whole_table_say_so(options: dict[str, str]) -> None:
    asked = KMeansConfig.model_validate({"clusters": 10_000_000, **options})
    with pytest.raises(ConfigError, match=r"holds all 10000000 centroids .* 114\.4 GiB.* 8 ranks"):
        ranks_per_row(asked, dim=768, ranks=64)
    once = asked.model_copy(update={"grid": 1})
    assert ranks_per_row(once, dim=768, ranks=64) == 1


def test_empty_clusters_take_from_the_largest_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        counts = torch.randint(0, 9, (20,), generator=generator)
        counts[0] += 1
        left = counts.clone()
        expected = []
        for cluster in (counts == 0).nonzero()[:, 0].tolist():
            donor = int(left.argmax())
            expected.append((cluster, donor))
            left[cluster], left[donor] = left[donor] // 2, -(-left[donor] // 2)
        assert splits_of(counts) == expected
        rows = torch.randn(20, 3, generator=generator)
        moved, number = refilled(rows.clone(), counts)
        assert number == len(expected)
        signs = torch.tensor([1.0, -1.0, 1.0])
        for cluster, donor in expected:
            rows[cluster] = rows[donor] * (1.0 + signs / 1024.0)
            rows[donor] = rows[donor] * (1.0 - signs / 1024.0)
        assert torch.equal(moved, rows)
