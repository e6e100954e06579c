"""Shards behind a server that fails often: all of them, once each, or an error that ends."""

from __future__ import annotations

import socket
from pathlib import Path

import fsspec
import pytest

from tests.data.bad_server import serve
from tests.data.streams import open_stream, same, write_shards
from tests.data.tars import make_samples, write_tar
from trainer.data import remote
from trainer.data.index import write_index
from trainer.data.remote import expand_shards, read_range
from trainer.data.shards import ShardSet
from trainer.errors import DataError


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)


@pytest.mark.heavy
@pytest.mark.parametrize("faults", [("reset",), ("busy",), ("short",)])
def test_a_fifth_of_the_requests_fails_and_every_sample_comes_once(tmp_path, faults):
    local = write_shards(tmp_path, [9, 0, 14, 5])
    with serve(tmp_path, faults=faults, share=0.2) as server:
        spec = f"{server.url}/{{000..003}}.tar"
        far = open_stream(spec, global_batch=28, micro_batch=7)
        assert sorted(i for b in far.take() for i in b.sample_id.tolist()) == sorted(
            ShardSet.open(local).ids.tolist()
        )
        far.seek(0)
        assert same(far.take(), open_stream(local, global_batch=28, micro_batch=7).take())
        assert server.count[faults[0]] > 4
        assert server.count.total() < 2 * 2 * (4 * 3 + 2 * 28)


def test_worker_processes_read_from_a_failing_server(tmp_path):
    local = write_shards(tmp_path, [9, 14])
    with serve(tmp_path, share=0.2) as server:
        spec = f"{server.url}/{{000..001}}.tar"
        far = open_stream(spec, global_batch=23, workers=1)
        opening = {path: n for path, n in server.count.items() if path.endswith(".index")}
        assert same(far.take(), open_stream(local, global_batch=23).take())
        far.close()
        assert len(opening) == 2
        assert opening.items() <= server.count.items()


def test_retries_are_bounded(tmp_path):
    write_shards(tmp_path, [3])
    with serve(tmp_path, faults=("reset",), share=1.0) as server:
        with pytest.raises(DataError, match=r"000.tar: 8 attempts failed"):
            ShardSet.open(f"{server.url}/000.tar")
        # fsspec asks for a size by HEAD and, when that fails, by GET; aiohttp tries each twice.
        assert server.count["any /000.tar"] <= 4 * remote.ATTEMPTS


def test_a_missing_file_is_not_asked_for_again(tmp_path):
    write_tar(tmp_path / "bare.tar", make_samples(2))
    with serve(tmp_path) as server:
        for name, message in (("nope.tar", "no shard"), ("bare.tar", "no index")):
            with pytest.raises(DataError, match=message):
                ShardSet.open(f"{server.url}/{name}")
            assert server.count[f"any /{name}"] <= 2


@pytest.mark.heavy
def test_a_server_without_ranges_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(bytes(100))
    monkeypatch.setattr("tests.data.bad_server.re.fullmatch", lambda *_: None)
    with (
        serve(tmp_path) as server,
        pytest.raises(DataError, match="expected 10 bytes from byte 5 on, found more"),
    ):
        read_range(f"{server.url}/a.bin", 5, 15)


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar"
        with pytest.raises(DataError, match="2 attempts failed, the last with: FSTimeoutError"):
            read_range(url, 0, 10)


def test_any_store_that_fsspec_knows(tmp_path):
    """memory:// stands for s3:// and gs://: indexes are written there, globs work."""
    store = fsspec.filesystem("memory")
    for number in range(3):
        path = write_tar(tmp_path / f"{number}.tar", make_samples(4, seed=number))
        store.pipe_file(f"/shards/{number}.tar", Path(path).read_bytes())
    for shard in expand_shards("memory://shards/*.tar"):
        assert write_index(shard) == 4
    shards = ShardSet.open("memory://shards/{0..1}.tar::memory://shards/2*.tar")
    assert shards.read(9).fields == make_samples(4, seed=2)["k0001"]
    assert len(shards) == 12
