"""A selection: which samples an epoch holds, exactly, whoever reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data import streams
from tests.data.streams import open_stream
from trainer.data.selection import (
    HEADER,
    Selection,
    kept_by_shard,
    scaled_shares,
    systematic,
    write_selection,
)
from trainer.data.shards import ShardSet
from trainer.errors import DataError


def write_shards(folder: Path, sizes: list[int]) -> str:
    folder.mkdir()
    return streams.write_shards(folder, sizes)


def select(folder: Path, spec: str, shares: list[list[float]]) -> Path:
    shards = ShardSet.open(spec)
    write_selection(
        folder,
        shards,
        {n: np.array(s, float) for n, s in zip(shards.names, shares, strict=True)},
        {},
    )
    return folder


def ids_of(stream, batches: int) -> list[int]:
    return [i for _ in range(batches) for i in stream.take()[0].sample_id.tolist()]


def test_an_epoch_holds_the_selected_samples_once_each_on_any_number_of_ranks_and_workers(tmp_path):
    spec = write_shards(tmp_path / "data", [10, 6, 9])
    chosen = [[1, 0] * 5, [0] * 6, [1, 1, 0] * 3]
    folder = select(tmp_path / "selection", spec, chosen)
    ids = ShardSet.open(spec).ids
    expected = sorted(ids[np.concatenate(chosen) > 0].tolist())
    stream = open_stream(spec, global_batch=11, select=folder)
    assert stream.epoch_size == 11
    first, second = ids_of(stream, 1), ids_of(stream, 1)
    assert sorted(first) == sorted(second) == expected
    assert first != second
    whole = open_stream(spec, global_batch=22, select=folder)
    parts = [
        open_stream(spec, global_batch=22, rank=r, world_size=2, workers=r, select=folder)
        for r in range(2)
    ]
    assert ids_of(whole, 2) == [
        i for _ in range(2) for part in parts for i in part.take()[0].sample_id.tolist()
    ]
    for part in parts:
        part.close()


@pytest.mark.heavy
def test_shares_between_draw_as_many_every_epoch_and_each_sample_at_its_rate(tmp_path):
    spec = write_shards(tmp_path / "data", [12, 20])
    shares = [[0.25] * 8 + [0.0] * 2 + [1.0] * 2, [0.5] * 10 + [0.0625] * 10]
    folder = select(tmp_path / "selection", spec, shares)
    stream = open_stream(spec, global_batch=10, select=folder)
    assert stream.epoch_size == round(np.sum(shares[0]) + np.sum(shares[1])) == 10
    place = {i: n for n, i in enumerate(ShardSet.open(spec).ids.tolist())}
    seen = np.zeros(32)
    epochs = 400
    for _ in range(epochs):
        found = [place[i] for i in ids_of(stream, 1)]
        assert len(set(found)) == 10
        seen[found] += 1
    assert (seen[8:10] == 0).all()
    assert (seen[10:12] == epochs).all()
    rates = np.array(shares[0] + shares[1])
    error = 5 * np.sqrt(np.maximum(rates * (1 - rates), 0.002) / epochs)
    assert (np.abs(seen / epochs - rates) < error + 0.15 * rates).all()


def test_a_run_goes_on_in_the_middle_of_an_epoch_and_only_with_its_own_selection(tmp_path):
    spec = write_shards(tmp_path / "data", [10, 10])
    folder = select(tmp_path / "one", spec, [[0.5] * 10, [1, 0] * 5])
    stream = open_stream(spec, global_batch=4, select=folder)
    expected = ids_of(stream, 6)
    lines = [*stream.shard_lines, *stream.folder_lines]
    again = open_stream(spec, global_batch=4, select=folder, before=lines)
    again.seek(12)
    assert ids_of(again, 3) == expected[12:]
    other = select(tmp_path / "other", spec, [[1.0] * 10, [1, 0] * 5])
    for changed in ({"select": other}, {}):
        with pytest.raises(DataError, match=r"data.select is not the folder that the run began"):
            open_stream(spec, global_batch=4, before=lines, **changed)


def test_what_takes_the_place_of_a_bad_sample_is_selected_too(tmp_path):
    spec = write_shards(tmp_path / "data", [20, 20])
    folder = select(tmp_path / "one", spec, [[1, 0] * 10, [0, 1] * 10])
    stream = open_stream(spec, global_batch=20, select=folder, workdir=tmp_path / "run")
    selected = set(ids_of(stream, 1))
    damage = tmp_path / "data" / "000.tar"
    shards = ShardSet.open(spec)
    data = bytearray(damage.read_bytes())
    place = shards._index(0).offset[0]
    data[int(place) + 20] ^= 255
    damage.write_bytes(data)
    again = open_stream(spec, global_batch=20, select=folder, bad_sample_budget=1.0)
    found = [ids_of(again, 1) for _ in range(5)]
    assert again.ledger.num_rejected == 5
    assert {i for each in found for i in each} <= selected - {int(shards.ids[0])}


def test_a_selection_of_other_shards_or_of_nothing_is_refused(tmp_path):
    spec = write_shards(tmp_path / "data", [5])
    other = write_shards(tmp_path / "other", [6])
    folder = select(tmp_path / "selection", other, [[1.0] * 6])
    with pytest.raises(DataError, match="was made of another 000"):
        open_stream(spec, select=folder)
    empty = select(tmp_path / "empty", spec, [[0.0] * 5])
    with pytest.raises(DataError, match="selects none of the 5 samples"):
        open_stream(spec, select=empty)
    with pytest.raises(DataError, match="holds no selection"):
        open_stream(spec, select=tmp_path)
    shutil.copy(folder / HEADER, tmp_path / HEADER)
    with pytest.raises(DataError, match=r"can't be read .*run tools/reduce.py again"):
        Selection.open(tmp_path, ShardSet.open(other), seed=0).rows(0, 0)


@pytest.mark.heavy
def test_systematic_draws_have_the_asked_probabilities():
    shares = np.array([0.9, 0.1, 0.4, 0.6, 1.0, 0.0])
    starts = (np.arange(2000) + 0.5) / 2000
    counts = np.zeros(6)
    for start in starts:
        found = systematic(shares, 3, start)
        assert len(set(found.tolist())) == 3
        counts[found] += 1
    np.testing.assert_allclose(counts / 2000, shares, atol=2e-3)


def test_water_filled_shares_sum_to_the_total_and_never_pass_one():
    shares = np.array([0.9, 0.9, 0.1, 0.05, 0.0])
    for total in (0.0, 1.0, 2.0, 3.0, 4.0, 9.0):
        found = scaled_shares(shares, total)
        assert found.max() <= 1
        assert found.sum() == pytest.approx(min(total, 4.0), abs=1e-9)
        assert found[4] == 0


def test_what_is_cut_off_one_shard_counts_for_the_next():
    kept = kept_by_shard({f"{n:02d}": 0.3 for n in range(10)})
    assert sum(kept.values()) == 3
    assert set(kept.values()) == {0, 1}
