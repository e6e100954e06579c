"""The sorted ids of a store on disk are those that a process would sort for itself."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.store.test_store import DIM, identity
from trainer.store import EmbeddingStore, StoreWriter
from trainer.store.header import HEADER, ShardEntry, StoreHeader, read_header
from trainer.store.lookup import FILE, open_lookup, sorted_lookup, write_lookup


def columns(count: int, *, shards: int, seed: int = 0) -> list[NDArray[np.int64]]:
    draw = np.random.default_rng(seed)
    return np.array_split(draw.integers(0, 2**63 - 1, count), shards)


def header_of(ids: list[NDArray[np.int64]]) -> StoreHeader:
    entries = {f"s{n}": ShardEntry(source="x", rows=len(part)) for n, part in enumerate(ids)}
    return StoreHeader(identity=identity(), count=sum(map(len, ids)), shards=entries)


@pytest.mark.parametrize("part_rows", [1, 7, 100, 1 << 20])
def test_any_division_gives_the_order_of_one_sort(tmp_path, monkeypatch, part_rows):
    monkeypatch.setattr("trainer.store.lookup._PART_ROWS", part_rows)
    ids = columns(500, shards=7)
    ids[3][:2] = ids[0][:2]  # the same id twice: the first row is found
    ids[5][0], ids[5][1] = 0, 2**63 - 1
    write_lookup(tmp_path, header_of(ids), ids)
    found = open_lookup(tmp_path, header_of(ids))
    expected = sorted_lookup(np.concatenate(ids))
    assert found is not None
    assert isinstance(found.ids, np.memmap)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.rows.tolist() == expected.rows.tolist()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.heavy
def test_memory_does_not_grow_with_the_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.store.lookup._PART_ROWS", 20_000)
    peaks = []
    for count in (200_000, 400_000, 800_000):
        ids = columns(count, shards=count // 10_000)
        tracemalloc.start()
        write_lookup(tmp_path, header_of(ids), ids)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[0]


def made(folder: Path, count: int = 30) -> EmbeddingStore:
    writer = StoreWriter.begin(folder, identity(), {"a": ("1", count), "b": ("2", count)})
    writer.announce()
    for number, name in enumerate("ab"):
        ids = np.arange(count) * 7919 % 31 * 2 + number
        writer.write(name, ids, torch.from_numpy(ids).float()[:, None, None].expand(-1, 1, DIM))
    writer.finish()
    return EmbeddingStore.open(folder)


def test_vectors_are_found_by_it_and_without_it(tmp_path):
    store = made(tmp_path)
    ids = torch.tensor([3, 0, 17, 58])
    assert store.rows(ids)[:, 0].tolist() == ids.tolist()
    assert "ids" not in vars(store)  # nothing has read the ids of all samples
    for damage in (b"", b"other", (tmp_path / FILE).read_bytes()[:-1], None):
        (tmp_path / FILE).unlink()
        if damage is not None:
            (tmp_path / FILE).write_bytes(damage)
        assert EmbeddingStore.open(tmp_path).rows(ids)[:, 0].tolist() == ids.tolist()
        (tmp_path / FILE).touch()


def test_that_of_other_shards_is_not_used(tmp_path):
    made(tmp_path)
    header = read_header(tmp_path / HEADER)
    assert header is not None
    assert open_lookup(tmp_path, header) is not None
    other = {**header.shards, "a": header.shards["a"].model_copy(update={"source": "9"})}
    assert open_lookup(tmp_path, header.model_copy(update={"shards": other})) is None
