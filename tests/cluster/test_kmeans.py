"""Sharded k-means: exact labels, the same bits for every world size, and faiss as the peer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ranks import run_ranks
from trainer.cluster.kmeans import KMeansConfig, KMeansResult, kmeans
from trainer.cluster.search.assign import assign, ordered_sum, pair_distances
from trainer.comm import Comm
from trainer.errors import ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "protoclip"


def mixture(count: int, dim: int, *, components: int, spread: float, seed: int) -> Tensor:
    """Unit rows around `components` unit centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(components, dim, generator=generator))
    which = torch.randint(components, (count,), generator=generator)
    noise = spread * torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(centres[which] + noise)


def distances(points: Tensor, centroids: Tensor) -> Tensor:
    """All squared distances in the canonical float64 form."""
    pairs = points.repeat_interleave(centroids.shape[0], 0)
    return pair_distances(pairs, centroids.repeat(points.shape[0], 1)).view(points.shape[0], -1)


def naive_labels(points: Tensor, centroids: Tensor) -> Tensor:
    return torch.from_numpy(distances(points, centroids).numpy().argmin(1))


def solo(points: Tensor, config: KMeansConfig, **options: Any) -> KMeansResult:
    ids = torch.arange(points.shape[0])
    return kmeans(points, options.pop("ids", ids), config, Comm.solo(), **options)


# -- the published arrays ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kmeans_clear", "kmeans_overlapping"])
def test_equals_the_original_from_its_starts(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        golden = {key: stored[key] for key in stored.files}
    points = torch.from_numpy(golden["points"])
    starts = torch.from_numpy(golden["init_point_ids"]).long()
    config = KMeansConfig(clusters=starts.shape[1], iterations=int(golden["niter"]))
    results = [solo(points, config, initial=points[start]) for start in starts]
    kept = results[int(golden["best_redo"])]
    assert kept.inertia == min(result.inertia for result in results)
    assert kept.labels.tolist() == golden["labels"].tolist()
    torch.testing.assert_close(
        kept.centroids, torch.from_numpy(golden["centroids"]), rtol=1e-5, atol=1e-6
    )
    assert kept.inertia == pytest.approx(float(golden["final_inertia_fp64"]), rel=1e-6)
    # faiss logs all restarts up to the one kept, and again a value that an update did not lower
    logged = [
        value * len(points)
        for result in results[: int(golden["best_redo"]) + 1]
        for value in (
            result.objective
            if len(result.objective) == config.iterations
            else [*result.objective, result.objective[-1]]
        )
    ]
    assert logged == pytest.approx(golden["objective_per_iteration"].tolist(), rel=1e-5)
    assert len(golden["splits_per_iteration"]) == len(logged)
    assert sum(result.repaired for result in results) == golden["splits_per_iteration"].sum()
    members = np.bincount(golden["labels"], minlength=config.clusters)
    assert kept.counts.tolist() == members.tolist()
    near = pair_distances(points, kept.centroids[kept.labels])
    assert near.numpy() == pytest.approx(golden["squared_distance"], rel=1e-5, abs=1e-6)
    for result, last in zip(results, golden["objective_final_per_redo_fp64_replay"], strict=True):
        assert result.objective[-1] * len(points) == pytest.approx(float(last), rel=1e-5)


@pytest.mark.parametrize("name", ["kmeans_clear", "kmeans_overlapping"])
def test_faiss_backend_equals_the_original(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        golden = {key: stored[key] for key in stored.files}
    points = torch.from_numpy(golden["points"])
    config = KMeansConfig(
        clusters=int(golden["num_clusters"])
        if "num_clusters" in golden
        else len(golden["centroids"]),
        iterations=int(golden["niter"]),
        restarts=int(golden["nredo"]),
        seed=int(golden["seed"]),
        backend="faiss",
    )
    shuffled = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    result = solo(points[shuffled], config, ids=shuffled)
    assert result.labels.tolist() == golden["labels"][shuffled.numpy()].tolist()
    torch.testing.assert_close(
        result.centroids, torch.from_numpy(golden["centroids"]), rtol=1e-5, atol=1e-6
    )
    assert result.inertia == pytest.approx(float(golden["final_inertia_fp64"]), rel=1e-6)


@pytest.mark.heavy
def test_equals_faiss_and_sklearn_from_the_same_start() -> None:
    import faiss
    from sklearn.cluster import KMeans

    points = mixture(3000, 24, components=40, spread=0.3, seed=1)
    start = points[:50].clone()
    ours = solo(points, KMeansConfig(clusters=50, iterations=15), initial=start)
    peer = faiss.Kmeans(24, 50, niter=15, nredo=1)
    peer.train(points.numpy(), init_centroids=start.numpy())
    _, found = peer.index.search(points.numpy(), 1)
    assert (torch.from_numpy(found[:, 0]) == ours.labels).float().mean() > 0.998
    other = KMeans(50, init=start.numpy(), n_init=1, max_iter=15, tol=0.0, algorithm="lloyd")
    other.fit(points.numpy())
    assert ours.inertia == pytest.approx(float(other.inertia_), rel=1e-4)
    assert (torch.from_numpy(other.labels_).long() == ours.labels).float().mean() > 0.998


# -- one result, whatever the ranks -----------------------------------------------------------


def shares(count: int, world_size: int) -> list[Tensor]:
    """Rows of each rank: ragged, out of order, rank 1 without any."""
    owner = torch.randint(world_size, (count,), generator=torch.Generator().manual_seed(world_size))
    owner[owner == 1] = 0 if world_size > 1 else owner[owner == 1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7 * world_size))
    return [order[owner[order] == rank] for rank in range(world_size)]


def data_sets() -> dict[str, tuple[Tensor, KMeansConfig]]:
    normal = mixture(700, 17, components=23, spread=0.4, seed=3)
    collapsed = 1.0 + 1e-4 * mixture(500, 12, components=5, spread=0.5, seed=4)
    grid = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0), torch.arange(3.0))
    copies = mixture(30, 6, components=3, spread=0.2, seed=5).repeat(5, 1)
    return {
        "mixture": (normal, KMeansConfig(clusters=37, iterations=8, row_block=64)),
        "restarts": (normal, KMeansConfig(clusters=5, iterations=6, restarts=3)),
        "spherical": (normal, KMeansConfig(clusters=21, iterations=6, spherical=True)),
        "collapsed": (collapsed, KMeansConfig(clusters=20, iterations=6)),
        "ties": (grid, KMeansConfig(clusters=14, iterations=9, column_block=32)),
        "copies": (copies, KMeansConfig(clusters=45, iterations=5)),
        "faiss": (normal, KMeansConfig(clusters=8, iterations=4, backend="faiss")),
        "early stop": (normal, KMeansConfig(clusters=9, iterations=50, tolerance=1e-3)),
        **odd_sets(normal),
    }


def odd_sets(normal: Tensor) -> dict[str, tuple[Tensor, KMeansConfig]]:
    """Points that stores really hold, and that centroids, lengths or sums could break on."""
    some = normal[:300]
    zeros = some.clone()
    zeros[::5] = 0.0
    pair = some[:2].repeat(40, 1)
    return {
        "zero rows": (zeros, KMeansConfig(clusters=7, iterations=5, spherical=True)),
        "all zero": (zeros[:60] * 0.0, KMeansConfig(clusters=3, iterations=3, spherical=True)),
        "one dimension": (some[:, :1], KMeansConfig(clusters=5, iterations=6)),
        "offset": (1e6 + some, KMeansConfig(clusters=5, iterations=6)),
        "two distinct": (pair, KMeansConfig(clusters=5, iterations=4, start="parallel")),
        "all equal": (pair[::2], KMeansConfig(clusters=6, iterations=3, start="hierarchical")),
        "opposite": (
            torch.cat([some, -some]),
            KMeansConfig(clusters=4, iterations=5, spherical=True),
        ),
        "tiny": (1e-42 * some, KMeansConfig(clusters=4, iterations=4)),
        "huge": (3e37 * some, KMeansConfig(clusters=4, iterations=4)),
    }


def cluster_shares(comm: Comm) -> dict[str, list[list[float]]]:
    """Every data set on this rank's share; tensors as lists, labels with their rows."""
    results: dict[str, list[Any]] = {}
    for name, (points, config) in data_sets().items():
        rows = shares(len(points), comm.world_size)[comm.rank]
        precision = ["auto", "float32", "bfloat16"][comm.rank % 3]
        blocks = config.model_copy(
            update={"row_block": 32 + 45 * comm.world_size, "precision": precision}
        )
        found = kmeans(points[rows], rows, blocks, comm)
        results[name] = [
            rows.tolist(),
            found.labels.tolist(),
            found.centroids.view(torch.int32).tolist(),
            found.counts.tolist(),
            [value.hex() for value in found.objective],
            [found.repaired, found.inertia.hex()],
        ]
    bad = torch.ones(3, 4)
    if comm.rank == comm.world_size - 1:
        bad[1, 2] = torch.nan
    try:
        ids = torch.tensor([100, 50, 70]) + 1000 * comm.rank
        kmeans(bad, ids, KMeansConfig(clusters=2), comm)
    except DataError as error:
        results["error"] = [str(error)]
    return results


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return cluster_shares(Comm.solo())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_bits_for_every_world_size(world_size: int, single: dict[str, Any]) -> None:
    assert single["copies"][5][0] > 0, "one of the cases must refill empty clusters"
    ranks = run_ranks(cluster_shares, world_size)
    for name in data_sets():
        expected = dict(zip(single[name][0], single[name][1], strict=True))
        labels: dict[int, int] = {}
        for rank in ranks:
            labels.update(zip(rank[name][0], rank[name][1], strict=True))
            assert rank[name][2:] == single[name][2:], name
        assert labels == expected, name
    for rank in ranks:
        assert f"id of them is {1000 * (world_size - 1) + 50};" in rank["error"][0]
        assert rank["error"][0].startswith("1 of the points")


@pytest.mark.heavy
def test_odd_points_get_finite_centroids_and_exact_labels(single: dict[str, Any]) -> None:
    for name, (points, config) in odd_sets(data_sets()["mixture"][0]).items():
        rows, labels, bits, counts, _, (_, inertia) = single[name]
        centroids = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert torch.isfinite(centroids).all(), name
        assert np.isfinite(float.fromhex(inertia)), name
        assert labels == naive_labels(points[rows], centroids).tolist(), name
        assert sum(counts) == len(points), name
        if config.spherical:
            lengths = centroids.norm(dim=1)
            assert (((lengths - 1).abs() < 1e-5) | (lengths == 0)).all(), name


@pytest.mark.heavy
@pytest.mark.parametrize("assignment", ["exact", "two_level"])
def test_same_bits_for_every_number_of_threads(assignment: str) -> None:
    points = mixture(3000, 37, components=40, spread=0.3, seed=2)
    points[::3] = points[1::3]  # ties
    config = KMeansConfig(clusters=50, iterations=4, spherical=True, assignment=assignment)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(solo(points, config))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.centroids, found[0].centroids)
        assert torch.equal(other.labels, found[0].labels)
        assert other.objective == found[0].objective


# -- assignment -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 70),
    clusters=st.integers(1, 70),
    dim=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "integers", "offset", "tiny", "huge", "copies"]),
    row_block=st.integers(1, 80),
    column_block=st.integers(1, 100),
    precision=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_label_is_the_argmin(
    count: int,
    clusters: int,
    dim: int,
    seed: int,
    kind: str,
    row_block: int,
    column_block: int,
    precision: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, dim, generator=generator)
    centroids = torch.randn(clusters, dim, generator=generator)
    if kind == "integers":
        points, centroids = points.round(), centroids.round()
    if kind == "offset":
        points, centroids = 1000 + 1e-3 * points, 1000 + 1e-3 * centroids
    if kind in ("tiny", "huge"):
        factor = 1e-25 if kind == "tiny" else 1e25
        points, centroids = points * factor, centroids * factor
    if kind == "copies":
        centroids = centroids[torch.randint(clusters, (clusters,), generator=generator) // 2]
        points = centroids[torch.randint(clusters, (count,), generator=generator)]
    labels = assign(
        points, centroids, row_block=row_block, column_block=column_block, precision=precision
    )
    assert labels.tolist() == naive_labels(points, centroids).tolist()


@pytest.mark.heavy
def test_labels_do_not_depend_on_blocks_where_rounding_decides() -> None:
    """Points on the bisector of many pairs of centroids: any rounding of the scan shows."""
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(300, 96, generator=generator)
    pairs = torch.randint(300, (800, 2), generator=generator)
    points = (centroids[pairs[:, 0]] + centroids[pairs[:, 1]]) / 2
    expected = naive_labels(points, centroids)
    scores = points @ centroids.T - 0.5 * centroids.square().sum(1)
    assert (scores.argmax(1) != expected).any()
    for row_block, column_block in [(1, 300), (7, 33), (512, 64), (800, 2048)]:
        labels = assign(points, centroids, row_block=row_block, column_block=column_block)
        assert torch.equal(labels, expected)
    assert torch.equal(assign(points, centroids, precision=torch.bfloat16), expected)
    order = torch.randperm(800, generator=generator)
    assert torch.equal(assign(points[order], centroids), expected[order])


def test_a_sum_in_fixed_order_is_the_sum() -> None:
    for width in (0, 1, 2, 3, 7, 64, 100):
        terms = torch.arange(float(3 * width), dtype=torch.float64).view(3, width)
        assert torch.equal(ordered_sum(terms.clone()), terms.sum(1))


# -- properties -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 120),
    dim=st.integers(1, 20),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
    spherical=st.booleans(),
    repeats=st.integers(1, 4),
)
def test_lloyd_on_ragged_shapes(
    count: int, dim: int, share: float, seed: int, spherical: bool, repeats: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, dim, generator=generator).repeat(repeats, 1)
    clusters = max(1, int(share * len(points)))
    config = KMeansConfig(clusters=clusters, iterations=6, spherical=spherical, seed=seed)
    found = solo(points, config)
    assert found.labels.tolist() == naive_labels(points, found.centroids).tolist()
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=clusters))
    inertia = float(pair_distances(points, found.centroids[found.labels]).sum())
    squares = float(points.double().square().sum())
    assert found.inertia == pytest.approx(inertia, rel=1e-9, abs=1e-12 * squares)
    if not found.repaired:
        values = [*found.objective, found.inertia / len(points)]
        slack = 1e-13 * squares
        assert all(a >= b - slack for a, b in itertools.pairwise(values))
    if spherical:
        assert found.centroids.norm(dim=1) == pytest.approx(np.ones(clusters), rel=1e-5)


def test_order_of_points_does_not_matter_even_with_repeated_ids() -> None:
    points = mixture(400, 10, components=12, spread=0.3, seed=6)
    ids = torch.arange(400) // 3
    config = KMeansConfig(clusters=60, iterations=4)
    first = solo(points, config, ids=ids)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    second = solo(points[order], config, ids=ids[order])
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.labels[order], second.labels)


def test_rotation_of_all_points_changes_nothing() -> None:
    points = mixture(600, 16, components=10, spread=0.15, seed=8)
    rotation = torch.linalg.qr(
        torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )[0]
    config = KMeansConfig(clusters=10, iterations=20)
    plain = solo(points, config)
    turned = solo((points.double() @ rotation).float(), config)
    assert torch.equal(plain.labels, turned.labels)
    torch.testing.assert_close(
        turned.centroids.double(), plain.centroids.double() @ rotation, rtol=0, atol=1e-6
    )
    scaled = solo(points * 4.0, config)
    assert torch.equal(plain.labels, scaled.labels)


def test_as_many_clusters_as_points() -> None:
    points = mixture(40, 8, components=40, spread=0.5, seed=9)
    found = solo(points, KMeansConfig(clusters=40))
    assert found.counts.tolist() == [1] * 40
    assert found.inertia == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(found.centroids[found.labels], points)


def test_identical_points_fill_one_cluster() -> None:
    found = solo(torch.ones(300, 5), KMeansConfig(clusters=40, iterations=3))
    assert found.counts.max() == 300
    assert found.repaired > 0
    assert solo(torch.zeros(9, 2), KMeansConfig(clusters=3)).inertia == 0.0


def test_empty_clusters_are_refilled_from_the_largest() -> None:
    near = mixture(90, 4, components=1, spread=0.05, seed=10)
    start = torch.cat([near[:2], torch.full((3, 4), 50.0)])
    config = KMeansConfig(clusters=5, iterations=1)
    once, again = solo(near, config, initial=start), solo(near, config, initial=start)
    assert once.repaired == 3
    assert torch.equal(once.centroids, again.centroids)
    sizes = torch.bincount(assign(near, start), minlength=5)
    largest = int(sizes.argmax())
    mean = near[assign(near, start) == largest].mean(0)
    # the largest gives to cluster 2, and the copy pushed apart keeps within 1/1024
    torch.testing.assert_close(once.centroids[2], mean, rtol=3e-3, atol=1e-6)
    assert not torch.equal(once.centroids[2], once.centroids[largest])
    longer = solo(near, KMeansConfig(clusters=5, iterations=20), initial=start)
    assert (longer.counts > 0).all()


@pytest.mark.heavy
def test_mistakes_are_named() -> None:
    points = torch.randn(5, 3)
    with pytest.raises(ConfigError, match=r"6 clusters .* there are 5; use at most 5"):
        solo(points, KMeansConfig(clusters=6))
    points[3, 1] = torch.inf
    with pytest.raises(DataError, match=r"1 of the points.*lowest sample id of them is 3"):
        solo(points, KMeansConfig(clusters=2))
    with pytest.raises(ConfigError, match=r"\(3, 3\) and must be \(2, 3\)"):
        solo(torch.zeros(4, 3), KMeansConfig(clusters=2), initial=torch.zeros(3, 3))
    with pytest.raises(DataError, match=r"3.4e\+38 in size.*scale the vectors"):
        solo(torch.full((4, 3), 3.4e38), KMeansConfig(clusters=2))
    with pytest.raises(ConfigError, match=r"at most 2096 numbers.*have 2200"):
        solo(torch.zeros(9, 2200), KMeansConfig(clusters=4, assignment="two_level"))
    with pytest.raises(ConfigError, match=r"overflow in faiss.*backend: torch"):
        solo(torch.full((9, 3), 1e30), KMeansConfig(clusters=4, backend="faiss"))
    with pytest.raises(ConfigError, match="at most 50000 clusters"):
        solo(torch.zeros(50_001, 1), KMeansConfig(clusters=50_001, backend="faiss", iterations=1))
