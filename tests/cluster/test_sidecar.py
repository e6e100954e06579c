"""Labels on disk: one file per shard, one map for all, by sample id."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.stores import write_store
from tests.cluster.test_kmeans import distances, mixture
from trainer.cluster.kmeans import KMeansConfig
from trainer.cluster.sidecar import lookup, merge_sidecars, write_sidecars
from trainer.cluster.stored import StoredPoints
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.errors import DataError
from trainer.store import EmbeddingStore

NAMES = ["train-000000", "train-000001", "train-000002"]


def written(folder: Path, *, count: int = 4, min_cosine: float | None = None) -> tuple[int, int]:
    """Write and merge; files written, samples merged."""
    rows = mixture(120, 6, components=9, spread=0.4, seed=1)
    ids = torch.randperm(120, generator=torch.Generator().manual_seed(3)) * 101
    if not (folder / "store").exists():
        write_store(folder / "store", rows, ids, sizes=[50, 0, 70])
    points = StoredPoints(EmbeddingStore.open(folder / "store"), Comm.solo())
    config = KMeansConfig(clusters=9, row_block=32)
    centroids = mixture(9, 6, components=9, spread=0.1, seed=1)
    find = lookup(centroids, points, config, Comm.solo(), count=count)
    stamp = f"{count} {min_cosine}"
    new = write_sidecars(points, find, folder / "labels", stamp=stamp, min_cosine=min_cosine)
    return new, merge_sidecars(folder / "labels", NAMES, folder, Comm.solo())


def test_lists_of_every_sample_by_id(tmp_path: Path) -> None:
    assert written(tmp_path) == (3, 120)
    rows = mixture(120, 6, components=9, spread=0.4, seed=1).half().float()
    ids = torch.randperm(120, generator=torch.Generator().manual_seed(3)) * 101
    exact = distances(rows, mixture(9, 6, components=9, spread=0.1, seed=1)).sort(1)
    labels = ClusterLabels.open(tmp_path)
    assert torch.equal(labels.top(ids), exact.indices[:, :4])
    assert torch.equal(labels.of(ids), exact.indices[:, 0])
    assert labels.top(torch.tensor([3])).tolist() == [[-1] * 4]
    shard = load_file(tmp_path / "labels" / "train-000002.safetensors")
    assert torch.equal(shard["ids"], ids[50:])
    torch.testing.assert_close(shard["distances"], exact.values[50:, :4].float())
    assert load_file(tmp_path / "labels" / "train-000001.safetensors")["clusters"].shape == (0, 4)
    assert written(tmp_path) == (0, 120), "what is there is kept"
    (tmp_path / "labels" / "train-000000.safetensors").write_bytes(b"cut")
    assert written(tmp_path) == (1, 120)
    assert written(tmp_path, count=2) == (3, 120), "other lists are written again"


def test_a_threshold_keeps_the_nearest_and_what_is_near(tmp_path: Path) -> None:
    written(tmp_path, min_cosine=0.5)
    rows = mixture(120, 6, components=9, spread=0.4, seed=1).half().float()
    ids = torch.randperm(120, generator=torch.Generator().manual_seed(3)) * 101
    centroids = mixture(9, 6, components=9, spread=0.1, seed=1)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], centroids[None], dim=2)
    found = ClusterLabels.open(tmp_path).top(ids)
    nearest = distances(rows, centroids).sort(1).indices[:, :4]
    for row, (listed, order) in enumerate(zip(found.tolist(), nearest.tolist(), strict=True)):
        kept = [order[0], *(k for k in order[1:] if cosine[row, k] >= 0.5)]
        assert [k for k in listed if k != -1] == kept
    assert (found[:, 1] == -1).any()
    assert (found[:, 1] != -1).any()


def test_an_id_given_twice_keeps_its_lowest_list(tmp_path: Path) -> None:
    rows = mixture(40, 6, components=4, spread=0.4, seed=1)
    ids = torch.arange(40) // 2
    store = write_store(tmp_path / "store", rows, ids, sizes=[25, 15])
    points = StoredPoints(store, Comm.solo())
    centroids = mixture(6, 6, components=6, spread=0.1, seed=1)
    find = lookup(centroids, points, KMeansConfig(clusters=6), Comm.solo(), count=3)
    write_sidecars(points, find, tmp_path / "labels", stamp="")
    assert merge_sidecars(tmp_path / "labels", NAMES[:2], tmp_path, Comm.solo()) == 20
    lists = find.find(points.rows(0, 40)).ids
    expected = ClusterLabels(ids, lists)
    opened = ClusterLabels.open(tmp_path)
    assert torch.equal(opened.top(torch.arange(20)), expected.top(torch.arange(20)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "labels" / "train-000002.safetensors").unlink()
    with pytest.raises(DataError, match="train-000002"):
        merge_sidecars(tmp_path / "labels", NAMES, tmp_path, Comm.solo())
