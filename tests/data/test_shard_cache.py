"""Remote shards in a folder of the machine: the same samples, each shard fetched once for all."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.data.bad_server import serve
from tests.data.streams import open_stream, png, same, write_shards
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.data import remote
from trainer.data.index import write_index
from trainer.data.shard_cache import ShardCache
from trainer.data.shards import ShardSet
from trainer.errors import DataError


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)


def contents(cache: ShardCache, url: str, size: int) -> bytes:
    descriptor = cache.open(url, size)
    try:
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def test_a_run_over_a_failing_server_reads_what_lies_there_in_few_requests(tmp_path):
    (tmp_path / "far").mkdir()
    local = write_shards(tmp_path / "far", [9, 14, 5])
    near = open_stream(local, global_batch=28)
    expected = [near.take() for _ in range(3)]
    with serve(tmp_path / "far", share=0.2) as server:
        spec = f"{server.url}/{{000..002}}.tar"
        kept = {"folder": tmp_path / "cache", "gib": 1}
        for workers in (0, 2):
            far = open_stream(spec, global_batch=28, shard_cache=kept, workers=workers)
            before = server.count["any /001.tar"]
            assert all(same(far.take(), step) for step in expected)
            far.seek(28)
            assert same(far.take(), expected[1])
            far.close()
            assert server.count["any /001.tar"] - before <= (12 if workers == 0 else 0)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    assert not list((tmp_path / "cache").glob("*.part"))


def of_rank(comm: Comm, folder: str, urls: list[str], sizes: list[int]) -> list[bytes]:
    cache = ShardCache(Path(folder), 1 << 20)
    return [contents(cache, url, size) for url, size in zip(urls, sizes, strict=True)]


def test_processes_of_a_machine_fetch_a_shard_once(tmp_path):
    (tmp_path / "far").mkdir()
    data = [random.Random(n).randbytes(40_000) for n in range(3)]
    for number, each in enumerate(data):
        (tmp_path / f"far/{number}.tar").write_bytes(each)
    with serve(tmp_path / "far") as server:
        urls = [f"{server.url}/{n}.tar" for n in range(3)]
        found = run_ranks(of_rank, 3, str(tmp_path / "cache"), urls, [40_000] * 3)
        assert found == [data] * 3
        assert [server.count[f"any /{n}.tar"] for n in range(3)] == [1, 1, 1]


def test_what_was_not_used_for_longest_makes_room_and_is_read_on_by_who_has_it_open(tmp_path):
    (tmp_path / "far").mkdir()
    for name in "abc":
        (tmp_path / f"far/{name}").write_bytes(name.encode() * 1000)
    cache = ShardCache(tmp_path / "cache", 2500)
    urls = {name: f"file://{tmp_path}/far/{name}" for name in "abc"}
    held = cache.open(urls["a"], 1000)
    for name in "bab":
        time.sleep(0.01)
        assert contents(cache, urls[name], 1000) == name.encode() * 1000
    time.sleep(0.01)
    contents(cache, urls["c"], 1000)
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) == 2000
    (tmp_path / "far/b").unlink()
    contents(cache, urls["b"], 1000)  # still here; "a" made room
    assert os.pread(held, 1000, 0) == b"a" * 1000
    os.close(held)
    with pytest.raises(DataError, match=r"3000 bytes, more than the 2500 of data\.shard_cache"):
        cache.open(urls["a"], 3000)


def slowly(folder: str, url: str, size: int) -> None:
    ShardCache(Path(folder), 1 << 20).open(url, size)


def test_a_fetch_that_is_killed_leaves_nothing_that_is_taken_for_a_shard(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    data = random.Random(0).randbytes(300_000)
    (tmp_path / "far/a.tar").write_bytes(data)
    url, cache = f"file://{tmp_path}/far/a.tar", ShardCache(tmp_path / "cache", 1 << 20)
    context = multiprocessing.get_context("forkserver")
    for wait in (0.0, 0.002, 0.01):
        process = context.Process(target=slowly, args=(str(cache.folder), url, len(data)))
        process.start()
        while not cache.folder.exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(wait)
        if process.pid and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert contents(cache, url, len(data)) == data
        for path in cache.folder.glob("*.tar"):
            path.unlink()
    assert contents(cache, url, len(data)) == data
    assert not list(cache.folder.glob("*.part"))


def test_a_full_or_missing_disk_is_one_sentence(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 10)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"can't keep file:.*/a in data\.shard_cache\.folder"):
        ShardCache(tmp_path / "file/cache", 100).open(f"file://{tmp_path}/a", 10)
    with pytest.raises(FileNotFoundError):
        ShardCache(tmp_path / "cache", 100).open(f"file://{tmp_path}/none", 10)


def test_a_parquet_file_of_a_server_is_fetched_once_and_read_from_the_disk(tmp_path):
    """Ten groups of rows cost ten requests and more from the server; from the folder none."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    ipc = importlib.import_module("pyarrow.ipc")
    (tmp_path / "far").mkdir()
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(40)]}
    rows["text"] = [f"sample {n}" for n in range(40)]
    table = pyarrow.table(rows)
    parquet.write_table(table, tmp_path / "far/one.parquet", row_group_size=4)
    with ipc.new_stream(str(tmp_path / "far/two.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=4)
    for name in ("one.parquet", "two.arrow"):
        write_index(str(tmp_path / "far" / name))
        local = ShardSet.open(str(tmp_path / "far" / name))
        expected = [local.read(index) for index in range(40)]
        with serve(tmp_path / "far") as server:
            far = ShardSet.open(f"{server.url}/{name}")
            far.keep_in(ShardCache(tmp_path / "cache", 1 << 20))
            found = [far.read(index) for index in range(40)]
            assert server.count[f"any /{name}"] <= 3
        assert [raw.fields for raw in found] == [raw.fields for raw in expected]
        assert [raw.sample_id for raw in found] == [raw.sample_id for raw in expected]
        far.close()
