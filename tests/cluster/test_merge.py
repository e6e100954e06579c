"""The map of all samples, made range by range by all ranks: that of one sort, whoever has what."""

from __future__ import annotations

import resource
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from trainer.cluster.merge import Rows, write_map
from trainer.comm import Comm
from trainer.data import labels
from trainer.data.labels import ClusterLabels
from trainer.hashing import hash_bits


def drawn(first: int, last: int, width: int = 3) -> Rows:
    """Hashed ids, of which every tenth is given twice with another list; lists by number."""
    numbers = torch.arange(first, last)
    ids = hash_bits(numbers - (numbers % 10 == 9).long(), 7).numpy().view("<u8") >> np.uint64(1)
    lists = hash_bits(numbers[:, None] + torch.arange(width), 5) % 1000
    return Rows(ids.astype(np.int64), lists.int().numpy())


def some_on_each(comm: Comm, folder: Path) -> int:
    pieces = [drawn(first, first + 700) for first in range(0, 7000, 700)]
    return write_map(folder, pieces[comm.rank :: comm.world_size], 3, comm)


def same_gathered(comm: Comm, folder: Path) -> None:
    pieces = [drawn(first, first + 700) for first in range(0, 7000, 700)]
    own = pieces[comm.rank :: comm.world_size]
    ids = torch.from_numpy(np.concatenate([rows.ids for rows in own]))
    lists = torch.from_numpy(np.concatenate([rows.lists for rows in own]))
    with mock.patch.object(labels, "_GATHERED_AT_ONCE", 500):
        found, expected = ClusterLabels.gather(ids, lists, comm), ClusterLabels.open(folder)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.top(found.ids), expected.top(found.ids))
    payload = {"bytes": ["é" * (comm.rank + 1)] * 3}
    assert comm.gather_json(payload) == [{"bytes": ["é" * n] * 3} for n in range(1, 4)]
    assert comm.broadcast_json(payload, source=2) == {"bytes": ["ééé"] * 3}


def both(comm: Comm, folder: Path) -> int:
    count = some_on_each(comm, folder)
    same_gathered(comm, folder)
    return count


@pytest.mark.heavy
def test_three_ranks_write_the_map_of_one_sort(tmp_path: Path) -> None:
    alone = some_on_each(Comm.solo(), tmp_path / "one")
    assert set(run_ranks(both, 3, tmp_path / "three")) == {alone}
    for name in ("ids.npy", "labels.npy"):
        one, three = ((tmp_path / f / name).read_bytes() for f in ("one", "three"))
        assert one == three
    whole = drawn(0, 7000)
    table = ClusterLabels(torch.from_numpy(whole.ids), torch.from_numpy(whole.lists))
    opened = ClusterLabels.open(tmp_path / "one")
    assert len(opened) == alone == len(table) == 6300
    assert torch.equal(opened.ids, table.ids)
    assert torch.equal(opened.top(table.ids), table.top(table.ids))
    assert sorted(p.name for p in (tmp_path / "three").iterdir()) == ["ids.npy", "labels.npy"]


def peak_of(comm: Comm, folder: Path, count: int) -> float:
    """Bytes a sample that writing the map adds to this process's peak."""
    pieces = (drawn(first, first + 50_000, 1) for first in range(0, count, 50_000))
    some_on_each(comm, folder / "first")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_map(folder, pieces, 1, comm)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / count


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    peaks = [run_ranks(peak_of, 1, tmp_path / str(n), n)[0] for n in (1 << 20, 1 << 21, 1 << 22)]
    print("bytes a sample beyond what is there:", peaks)
    assert peaks[2] < 20 < 62, "one sort of all took 62 bytes a sample at 4.8 million"
    assert peaks[2] < 0.75 * peaks[0]
