"""A catalogue says what its shards say, and opening it looks at none of them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.data.streams import open_stream, same, write_shards
from tests.data.tars import make_samples, write_tar
from trainer.data.catalogue import open_catalogue
from trainer.data.index import write_index
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.programs.catalogue import make_catalogue


def shards_in(folder: Path, count: int, samples: int, *, seed: int = 0) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        made = make_samples(samples + number, seed=seed + number)
        write_index(write_tar(folder / f"{number:03d}.tar", made))
    return f"{folder}/{{000..{count - 1:03d}}}.tar"


def alike(left: ShardSet, right: ShardSet) -> None:
    assert [os.path.realpath(path) for path in left.shards] == [
        os.path.realpath(path) for path in right.shards
    ]
    assert left.lines == right.lines
    assert left.sizes == right.sizes
    assert left.ids.tolist() == right.ids.tolist()
    for index in range(len(left)):
        assert left.read(index)._replace(shard="") == right.read(index)._replace(shard="")
        assert left.name_of(index)[1:] == right.name_of(index)[1:]


def test_it_holds_what_the_shards_hold_in_any_order_and_in_worker_processes(tmp_path):
    spec = shards_in(tmp_path / "s", 5, 4)
    path = str(tmp_path / "all.catalogue")
    assert make_catalogue(spec, path) == 4 + 5 + 6 + 7 + 8
    plain, opened = ShardSet.open(spec), ShardSet.open(path)
    alike(opened, plain)
    alike(pickle.loads(pickle.dumps(opened)), plain)
    before = [plain.lines[row] for row in (3, 0, 4, 1, 2)]
    alike(ShardSet.open(path, before=before), ShardSet.open(spec, before=before))


def test_it_moves_with_its_shards(tmp_path):
    make_catalogue(shards_in(tmp_path / "one/s", 2, 3), str(tmp_path / "one/all.catalogue"))
    shutil.move(tmp_path / "one", tmp_path / "two")
    opened = ShardSet.open(str(tmp_path / "two/all.catalogue"))
    alike(opened, ShardSet.open(f"{tmp_path}/two/s/*.tar"))


@pytest.mark.parametrize("named", [True, False])
def test_sets_of_equal_shard_names_stay_apart(tmp_path, named):
    one, two = (shards_in(tmp_path / name, 2, 3) for name in ("one", "two"))
    spec = f"a={one}::b={two}" if named else f"{one}::{two}"
    make_catalogue(spec, str(tmp_path / "all.catalogue"))
    opened = ShardSet.open(str(tmp_path / "all.catalogue"))
    assert set(opened.sets) == ({"a", "b"} if named else {"one", "two"})
    alike(opened, ShardSet.open(spec))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.catalogue", "one", "two"]


def test_opening_costs_no_look_at_any_shard_and_no_index_in_memory(tmp_path, monkeypatch):
    spec = shards_in(tmp_path / "s", 8, 40)
    path = str(tmp_path / "all.catalogue")
    make_catalogue(spec, path)
    for name in ("os.stat", "os.open"):
        monkeypatch.setattr(name, lambda *arguments, name=name, **_: pytest.fail(name))
    opened = ShardSet.open(path)
    monkeypatch.undo()
    assert isinstance(opened.ids, np.memmap)
    held = len(pickle.dumps(opened))
    assert held < 8 * 300 < (tmp_path / "all.catalogue").stat().st_size / 5


def ids_peak(spec: str) -> int:
    """Bytes. Now and then the interpreter allocates some for itself: take the least of several."""
    shards = ShardSet.open(spec)
    tracemalloc.start()
    assert len(shards.ids) == len(shards)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.heavy
def test_the_ids_of_a_list_hold_eight_bytes_a_sample(tmp_path, monkeypatch):
    """Beside the parsed indexes that are kept, which are as many for each of these lists."""
    for reader in ("shards", "open_files"):
        monkeypatch.setattr(f"trainer.data.{reader}.OPEN_SHARDS", 4)
    folder, samples = tmp_path / "s", 400
    folder.mkdir()
    first = write_tar(folder / "000.tar", make_samples(samples))
    write_index(first)
    for number in range(1, 20):
        for suffix in (".tar", ".tar.index"):
            os.link(folder / f"000{suffix}", folder / f"{number:03d}{suffix}")
    peaks = [
        min(ids_peak(f"{folder}/{{000..{count - 1:03d}}}.tar") for _ in range(3))
        for count in (5, 10, 20)
    ]
    for smaller, larger, more in ((0, 1, 5), (1, 2, 10)):
        assert (peaks[larger] - peaks[smaller]) / (more * samples) < 10


def test_a_run_takes_the_same_batches_and_goes_on_from_a_list_to_its_catalogue(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    spec = "::".join(f"{name}={write_shards(tmp_path / name, [5, 7])}" for name in ("a", "b"))
    path = str(tmp_path / "all.catalogue")
    make_catalogue(spec, path)
    options = {"weights": {"a": 2, "b": 0.5}, "global_batch": 6}
    listed = open_stream(spec, **options)
    whole = [listed.take() for _ in range(10)]
    for workers in (0, 1):
        stream = open_stream(path, before=listed.shard_lines, workers=workers, **options)
        stream.seek(12)
        for step in whole[2:]:
            assert same(stream.take(), step)
        stream.close()
    with pytest.raises(ConfigError, match=r"names the set 'c', .* does not hold; it has a, b"):
        open_stream(path, weights={"c": 1.0})


def test_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "all.catalogue"
    make_catalogue(shards_in(tmp_path / "s", 3, 6), str(path))
    whole = path.read_bytes()
    for place, what in ((10, "header"), (-5, "table of shards")):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"its {what} do not match"):
            ShardSet.open(str(path))
    path.write_bytes(whole)
    data = bytearray(whole)
    data[open_catalogue(str(path)).ids_at + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="its sample ids do not match"):
        _ = ShardSet.open(str(path)).ids
    path.write_bytes(whole[:-3])
    with pytest.raises(DataError, match="table of shards"):
        ShardSet.open(str(path))
    path.write_bytes(b"no")
    with pytest.raises(DataError, match="is no catalogue of shards; write it: python tools/index"):
        ShardSet.open(str(path))
    with pytest.raises(DataError, match=r"no catalogue .*none\.catalogue"):
        ShardSet.open(str(tmp_path / "none.catalogue"))


def test_a_shard_that_changed_since_is_named_when_it_is_read(tmp_path):
    spec = shards_in(tmp_path / "s", 2, 6)
    path = str(tmp_path / "all.catalogue")
    make_catalogue(spec, path)
    os.truncate(tmp_path / "s/001.tar", 512)
    opened = ShardSet.open(path)
    opened.read(0)
    with pytest.raises(DataError, match=r"001.tar is truncated"):
        opened.read(len(opened) - 1)


def test_it_stands_alone(tmp_path):
    spec = shards_in(tmp_path / "s", 1, 2)
    make_catalogue(spec, str(tmp_path / "a.catalogue"))
    for wrong in (f"{spec}::{tmp_path}/a.catalogue", f"x={tmp_path}/a.catalogue"):
        with pytest.raises(DataError, match="a catalogue stands alone and without a name"):
            ShardSet.open(wrong)


def test_the_tool_writes_it_and_a_broken_shard_keeps_it_from_being_written(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", make_samples(4, seed=number))
    tool = [sys.executable, "tools/index.py", f"{folder}/*.tar", "--missing"]
    out = str(tmp_path / "all.catalogue")
    done = subprocess.run([*tool, "--catalogue", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 12 samples of 3 shards" in done.stdout
    assert len(ShardSet.open(out)) == 12
    os.unlink(out)
    (folder / "3.tar").write_bytes(b"x" * 1000)
    broken = subprocess.run([*tool, "--catalogue", out], capture_output=True, text=True)
    assert broken.returncode == 2
    assert not os.path.exists(out)


def test_some_samples_are_as_many_as_asked_out_of_few_shards(tmp_path):
    spec = shards_in(tmp_path / "s", 30, 3)
    shards = ShardSet.open(spec)
    rows = shards.some(10, shards=4)
    assert len(rows) == len(set(rows.tolist())) == 10
    assert {shards.locate(row)[0] for row in rows.tolist()} <= {0, 9, 19, 29}
    assert shards.some(10**6, shards=64).tolist() == list(range(len(shards)))


def test_samples_are_found_by_id_shard_after_shard(tmp_path):
    spec = shards_in(tmp_path / "s", 6, 5)
    shards = ShardSet.open(spec)
    ids = shards.ids[[9, 2, 30]].tolist()
    assert shards.find([*ids, 5]) == [(2, ids[1]), (9, ids[0]), (30, ids[2])]
    fresh = ShardSet.open(spec)
    assert fresh.find(ids[1:2]) == [(2, ids[1])]
    assert len(fresh._indexes) == 1
