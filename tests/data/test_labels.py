"""Labels are joined by sample id: order, duplicates, unknown ids and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import run_ranks
from trainer.cluster.kmeans import KMeansConfig, kmeans
from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.errors import DataError

IDS = st.integers(0, 2**63 - 1) | st.integers(0, 20)


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(st.tuples(IDS | st.just(-1), st.integers(-1, 2**40)), max_size=40),
    asked=st.lists(IDS, max_size=20),
)
def test_lookup_equals_a_dictionary(pairs: list[tuple[int, int]], asked: list[int]) -> None:
    expected: dict[int, int] = {}
    for sample, label in pairs:
        if sample != -1 and label >= 0:
            expected[sample] = min(label, expected.get(sample, label))
    ids, labels = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
    table = ClusterLabels(ids, labels)
    wanted = torch.tensor([*asked, *(p[0] for p in pairs), -1], dtype=torch.int64)
    assert table.of(wanted).tolist() == [expected.get(i, -1) for i in wanted.tolist()]
    assert len(table) == len(expected)
    assert table.ids.tolist() == sorted(expected)


def test_order_of_the_input_does_not_matter() -> None:
    ids = torch.randint(0, 50, (200,))
    labels = torch.randint(0, 9, (200,))
    order = torch.randperm(200)
    first, second = ClusterLabels(ids, labels), ClusterLabels(ids[order], labels[order])
    assert torch.equal(first.labels, second.labels)


def test_saved_map_is_the_same_and_is_not_read_into_memory(tmp_path: Path) -> None:
    for top in (2**31 - 1, 2**31):
        table = ClusterLabels(torch.tensor([9, 2**62, 3]), torch.tensor([0, top, 5]))
        table.save(tmp_path / "labels")
        loaded = ClusterLabels.open(tmp_path / "labels")
        asked = torch.tensor([3, 4, 9, 2**62, -1])
        assert loaded.of(asked).tolist() == [5, -1, 0, top, -1] == table.of(asked).tolist()
        assert loaded.labels.dtype == (torch.int32 if top < 2**31 else torch.int64)
        assert loaded.of(asked).dtype == torch.int64
    assert isinstance(np.load(tmp_path / "labels" / "ids.npy", mmap_mode="r"), np.memmap)
    assert ClusterLabels.open(tmp_path / "labels").to("cpu").of(asked).tolist()[0] == 5


def test_several_clusters_per_sample(tmp_path: Path) -> None:
    ids = torch.tensor([50, 7, 2**61, 7, -1, 9])
    rows = torch.tensor([[3, 1, -1], [4, 2, 8], [0, 5, 6], [4, 2, 7], [1, 1, 1], [-1, -1, -1]])
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    for table in (ClusterLabels(ids, rows), ClusterLabels(ids[order], rows[order])):
        table.save(tmp_path)
        opened = ClusterLabels.open(tmp_path)
        asked = torch.tensor([2**61, 7, 50, 9, 8, -1])
        expected = [[0, 5, 6], [4, 2, 7], [3, 1, -1], [-1] * 3, [-1] * 3, [-1] * 3]
        assert opened.top(asked).tolist() == expected == table.top(asked).tolist()
        assert opened.of(asked).tolist() == [0, 4, 3, -1, -1, -1]
        assert opened.top(asked).dtype == opened.of(asked).dtype == torch.int64
        assert opened.per_sample == 3
        assert opened.labels.tolist() == [4, 3, 0]


def test_an_empty_map_knows_nothing(tmp_path: Path) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    table = ClusterLabels(nothing, nothing)
    assert table.of(torch.tensor([1, -1])).tolist() == [-1, -1]
    table.save(tmp_path)
    with pytest.raises(DataError, match="can't read"):
        ClusterLabels.open(tmp_path / "elsewhere")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    table = ClusterLabels(torch.arange(1000), torch.arange(1000) % 7)
    table.save(tmp_path)
    whole = (tmp_path / "labels.npy").read_bytes()
    (tmp_path / "labels.npy").write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"labels\.npy"):
        ClusterLabels.open(tmp_path)
    np.save(tmp_path / "labels.npy", np.zeros(999, dtype=np.int32))
    with pytest.raises(DataError, match="999"):
        ClusterLabels.open(tmp_path)


def aligned(comm: Comm) -> list[bool]:
    """Features that carry their sample's id, spread and shuffled over the ranks."""
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5))
    if comm.is_main:
        torch.rand(7)  # a draw that only one rank makes must not matter
    rows = order[comm.rank :: comm.world_size]
    ids = rows * 7919 + 2**40
    features = torch.stack([(rows // 30).float(), torch.zeros(len(rows))], 1)
    start = torch.stack([torch.arange(10) + 0.3, torch.ones(10)], 1)
    found = kmeans(features, ids, KMeansConfig(clusters=10), comm, initial=start)
    table = ClusterLabels.gather(ids, found.labels, comm)
    asked = torch.randperm(300) * 7919 + 2**40
    groups = (asked - 2**40) // 7919 // 30
    return (table.of(asked) == groups).tolist()


def test_labels_follow_their_sample_through_ranks() -> None:
    assert all(aligned(Comm.solo()))
    for rank in run_ranks(aligned, 3):
        assert all(rank)


def test_a_label_behind_minus_one_is_not_lost(tmp_path: Path) -> None:
    table = ClusterLabels(
        torch.tensor([7, 5, 3]), torch.tensor([[-1, 4, 2], [-1, -1, -1], [6, -7, 1]])
    )
    assert table.top(torch.tensor([7, 5, 3])).tolist() == [[4, 2, -1], [-1] * 3, [6, 1, -1]]
    table.save(tmp_path)
    assert ClusterLabels.open(tmp_path).of(torch.tensor([7, 3])).tolist() == [4, 6]


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([3, 1, 2], [0, 1, 2], "ascending order"),
        ([1, 2, 2], [0, 1, 2], "ascending order"),
        ([1, 2, 3], [[0, 1], [-1, 2], [3, 4]], "behind a -1"),
        ([1, 2, 3], [0.5, 1.0, 2.0], "whole numbers"),
    ],
)
def test_a_map_in_which_wrong_labels_would_be_found_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[int], labels: list[int], message: str
) -> None:
    np.save(tmp_path / "ids.npy", np.array(ids))
    np.save(tmp_path / "labels.npy", np.array(labels))
    for rows in (1, 2, 100):
        monkeypatch.setattr("trainer.data.labels._CHECKED_ROWS", rows)
        with pytest.raises(DataError, match=message):
            ClusterLabels.open(tmp_path)
