"""Points on disk: the same bits as in memory, whatever the shards, blocks and ranks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.stores import poison, write_store
from tests.cluster.test_kmeans import mixture
from tests.ranks import run_ranks
from trainer.cluster.kmeans import KMeansConfig, KMeansResult, cluster, kmeans
from trainer.cluster.points import Chosen, Points, Resident, UnitLength, stream
from trainer.cluster.stored import StoredPoints, deal
from trainer.comm import Comm
from trainer.errors import ConfigError, DataError
from trainer.store import EmbeddingStore
from trainer.store.shard_file import read_exactly

SIZES = [130, 0, 1, 250, 19, 200]
CONFIGS = {
    "exact": KMeansConfig(clusters=37, iterations=5, row_block=64),
    "spherical": KMeansConfig(clusters=21, iterations=4, spherical=True, precision="float32"),
    "two-level": KMeansConfig(clusters=60, iterations=4, assignment="two_level", probes=3),
}


def ids_of(count: int) -> torch.Tensor:
    return torch.arange(count) * 7919 + 2**40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    points = mixture(600, 17, components=23, spread=0.4, seed=3)
    for kind in ("float16", "int8"):
        write_store(folder / kind, points, ids_of(600), sizes=SIZES, dtype=kind)
    return folder


def facts(found: KMeansResult) -> list[Any]:
    return [
        found.centroids.view(torch.int32).tolist(),
        found.counts.tolist(),
        [value.hex() for value in [*found.objective, found.inertia]],
        found.repaired,
    ]


def clustered(comm: Comm, folder: str) -> dict[str, list[Any]]:
    results = {}
    for kind in ("float16", "int8"):
        store = EmbeddingStore.open(Path(folder) / kind)
        for name, config in CONFIGS.items():
            size = 50 + 33 * comm.world_size
            points = StoredPoints(store, comm, unit_length=name == "spherical")
            blocks = config.model_copy(update={"row_block": size})
            found = cluster(points, blocks, comm)
            labels = dict(
                zip(points.ids(0, len(points)).tolist(), found.labels.tolist(), strict=True)
            )
            results[f"{kind} {name}"] = [labels, *facts(found)]
    return results


def test_a_store_is_clustered_as_if_it_were_in_memory_on_any_ranks(folder: Path) -> None:
    expected: dict[str, list[Any]] = {}
    for kind in ("float16", "int8"):
        rows = EmbeddingStore.open(folder / kind).rows(ids_of(600))
        for name, config in CONFIGS.items():
            given = UnitLength(Resident(rows, ids_of(600)))
            points: Points = given if name == "spherical" else Resident(rows, ids_of(600))
            found = cluster(points, config, Comm.solo())
            labels = dict(zip(ids_of(600).tolist(), found.labels.tolist(), strict=True))
            expected[f"{kind} {name}"] = [labels, *facts(found)]
    assert clustered(Comm.solo(), str(folder)) == expected
    for world_size in (2, 3, 4):
        ranks = run_ranks(clustered, world_size, str(folder))
        for name, whole in expected.items():
            assert {i: k for rank in ranks for i, k in rank[name][0].items()} == whole[0]
            assert all(rank[name][1:] == whole[1:] for rank in ranks), name


@pytest.mark.heavy
@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(0, 600),
    length=st.integers(0, 600),
    places=st.lists(st.integers(0, 599), max_size=30),
)
def test_any_range_and_any_places_are_read(
    folder: Path, first: int, length: int, places: list[int]
) -> None:
    store = EmbeddingStore.open(folder / "float16")
    points, last = StoredPoints(store, Comm.solo()), min(first + length, 600)
    rows = store.rows(ids_of(600))
    assert torch.equal(points.rows(first, last), rows[first:last])
    assert torch.equal(points.ids(first, last), ids_of(600)[first:last])
    chosen = torch.tensor(places, dtype=torch.int64)
    assert torch.equal(points.take(chosen), rows[chosen])
    some = Chosen(points, chosen.unique())
    assert torch.equal(some.rows(0, len(some)), rows[chosen.unique()])
    assert torch.equal(some.ids(0, len(some)), ids_of(600)[chosen.unique()])


def test_one_of_several_vectors(tmp_path: Path) -> None:
    rows = mixture(60, 5, components=4, spread=0.4, seed=2).view(20, 3, 5)
    store = write_store(tmp_path, rows, ids_of(20), sizes=[12, 8])
    for which in range(3):
        points = StoredPoints(store, Comm.solo(), which=which)
        assert torch.equal(points.rows(3, 17), rows[3:17, which].half().float())
    with pytest.raises(ConfigError, match="vectors 0 to 2, no 3"):
        StoredPoints(store, Comm.solo(), which=3)


def test_a_poisoned_sample_is_named_and_a_cut_file_too(tmp_path: Path) -> None:
    points = mixture(50, 8, components=4, spread=0.4, seed=2)
    store = write_store(tmp_path, points, ids_of(50), sizes=[20, 30])
    poison(tmp_path, "train-000001", torch.tensor([0.1, torch.nan]))
    with pytest.raises(DataError, match=rf"1 of the points.* {int(ids_of(50)[20])};"):
        cluster(StoredPoints(store, Comm.solo()), KMeansConfig(clusters=3), Comm.solo())
    path = tmp_path / "train-000000.vectors"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(DataError, match=r"train-000000\.vectors should hold"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(DataError, match=r"train-000000\.vectors should hold"):
        StoredPoints(store, Comm.solo())


def test_a_read_that_fails_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(range(100)))
    with path.open("rb") as file:
        assert bytes(read_exactly(file.fileno(), path, 90, 10)) == bytes(range(90, 100))
        with pytest.raises(DataError, match=r"short ends at byte 100, 5 bytes too early"):
            read_exactly(file.fileno(), path, 90, 15)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(DataError, match=r"can't be read: Is a directory"):
        read_exactly(descriptor, tmp_path, 0, 1)
    os.close(descriptor)


def test_more_clusters_than_points_on_disk(folder: Path) -> None:
    points = StoredPoints(EmbeddingStore.open(folder / "int8"), Comm.solo())
    with pytest.raises(ConfigError, match=r"601 clusters need .* 600;"):
        cluster(points, KMeansConfig(clusters=601), Comm.solo())


class Failing(Resident):
    """A disk that fails at the third block."""

    resident = False

    def rows(self, first: int, last: int) -> torch.Tensor:
        if first >= 20:
            raise OSError("the disk is gone")
        return super().rows(first, last)


def test_reading_ahead_keeps_the_order_and_stops_with_its_reader() -> None:
    rows, before = torch.randn(95, 3), threading.active_count()
    disk = Failing(rows, torch.arange(95))
    got = []

    def read() -> None:
        for place, block in stream(disk, 10, torch.device("cpu")):
            got.append(place.start)
            assert torch.equal(block, rows[place])

    with pytest.raises(OSError, match="the disk is gone"):
        read()
    assert got == [0, 10]
    reader = stream(disk, 10, torch.device("cpu"))
    next(reader)
    reader.close()
    assert threading.active_count() == before


def test_shards_are_dealt_evenly() -> None:
    hands = deal([10, 1, 1, 9, 5, 5], 3)
    assert sorted(item for hand in hands for item in hand) == [0, 1, 2, 3, 4, 5]
    assert [sum([10, 1, 1, 9, 5, 5][item] for item in hand) for hand in hands] == [11, 10, 10]
    assert deal([3], 2) == [[0], []]


def test_an_episode_is_points_in_memory() -> None:
    rows = mixture(200, 9, components=6, spread=0.3, seed=8)
    config = KMeansConfig(clusters=12, iterations=4)
    first = kmeans(rows, torch.arange(200), config, Comm.solo())
    second = cluster(Resident(rows, torch.arange(200)), config, Comm.solo())
    assert facts(first) == facts(second)
    assert torch.equal(first.labels, second.labels)
