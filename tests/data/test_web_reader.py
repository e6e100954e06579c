"""The webdataset reader: the same batches in kind, and pipes only on request."""

from __future__ import annotations

import bz2
import gc
import gzip
import io
import json
import lzma
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data.streams import SIDE, open_stream, same, write_shards
from tests.data.tars import write_tar
from trainer.config import DataConfig
from trainer.data.shards import ShardSet
from trainer.data.vocabulary import captions_of
from trainer.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _files_left_to_the_collector():
    """An abandoned stream still holds one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def open_web(spec: str, **config):
    return open_stream(spec, **{"reader": "webdataset", "epoch_samples": 30, **config})


@pytest.mark.heavy
def test_batches_have_the_same_form_and_ids(tmp_path):
    spec = write_shards(tmp_path, [12, 9, 9])
    known = set(ShardSet.open(spec).ids.tolist())
    for workers in (0, 1):
        stream = open_web(spec, global_batch=8, micro_batch=4, workers=workers)
        assert stream.epoch_size == 30
        seen: set[int] = set()
        for _ in range(30):
            batches = stream.take()
            assert [batch.images.shape for batch in batches] == [(4, 3, SIDE, SIDE)] * 2
            assert all(batch.tokens.shape == (4, 8) for batch in batches)
            seen |= {i for batch in batches for i in batch.sample_id.tolist()}
        assert seen == known
        view = list(stream.view(0, 10, purpose="episode"))
        assert [int((batch.sample_id >= 0).sum()) for batch in view] == [4, 4, 2]
        stream.close()


def test_ranks_and_positions_draw_their_own_shards(tmp_path):
    spec = write_shards(tmp_path, [1] * 20)
    drawn = []
    for rank, start in ((0, 0), (1, 0), (0, 64), (0, 0)):
        stream = open_web(spec, rank=rank, world_size=2, global_batch=32)
        stream.seek(start)
        drawn.append(stream.take()[0].sample_id)
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_pipes_need_permission(tmp_path):
    shard = write_shards(tmp_path, [5]).replace("{000..000}", "000")
    with pytest.raises(ConfigError, match=r"data\.allow_pipe: true"):
        open_web(f"pipe:cat {shard}")
    stream = open_web(f"pipe:cat {shard}", allow_pipe=True)
    assert len(stream.take()[0].sample_id) == 8
    stream.close()


@pytest.mark.heavy
def test_mistakes_end_the_stream(tmp_path):
    spec = write_shards(tmp_path, [5])
    with pytest.raises(ConfigError, match=r"data\.epoch_samples"):
        open_web(spec, epoch_samples=None)
    with pytest.raises(DataError, match="1000 samples in a row could not be used"):
        open_web(spec, captions={"fields": ("nothing",)}).take()
    empty = tmp_path / "empty.tar"
    with tarfile.open(empty, "w") as archive:
        archive.addfile(tarfile.TarInfo("__meta__"), io.BytesIO())
    with pytest.raises(DataError, match="1000 shards in a row held no sample"):
        open_web(str(empty)).take()
    (tmp_path / "cut.tar").write_bytes((tmp_path / "000.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"1000 samples in a row .*cut\.tar.*can't be read on"):
        open_web(f"{tmp_path}/cut.tar").take()
    for path, why in ((tmp_path / "nope.tar", "is not there"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=why):
            open_web(str(path))


def damaged(folder: Path) -> dict[str, Path]:
    """A shard of ten samples, damaged in every way that a stream can meet."""
    whole = folder / "whole"
    whole.mkdir(parents=True)
    write_shards(whole, [10])
    data = (whole / "000.tar").read_bytes()
    flipped = bytearray(data)
    flipped[data.index(b"00005.png") + 3] ^= 1  # in the header of a tar's member
    packed = gzip.compress(data)
    made = {
        "cut": data[: len(data) // 2 + 100],
        "flipped": bytes(flipped),
        "page": b"<html>403</html>" * 100,
        "empty": b"",
        "cut gzip": packed[: len(packed) * 2 // 3],
    }
    found = {}
    for name, content in made.items():
        found[name] = folder / f"{name.replace(' ', '-')}.tar"
        found[name].write_bytes(content)
    return found


def test_a_shard_that_can_not_be_read_on_is_a_line_and_against_the_budget(tmp_path: Path) -> None:
    """Training goes on with the others; the budget, as for the indexed reader, ends it."""
    spec = write_shards(tmp_path, [10, 10, 10])
    for name, path in damaged(tmp_path / "bad").items():
        for workers in (0, 1) if name == "cut" else (0,):
            workdir = tmp_path / f"{name} {workers}"
            both = f"{spec}::{path}"
            options = {"global_batch": 20, "workers": workers, "workdir": workdir}
            stream = open_web(both, bad_sample_budget=0.5, **options)
            assert taken(stream, 10) == 200
            read, rejected = stream.ledger.num_read, stream.ledger.num_rejected
            stream.close()
            text = (workdir / "ledger/rank-0.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            assert {line["shard"] for line in lines} == {str(path)}, name
            unread = [line["reason"] for line in lines if not line["key"]]
            assert all(reason.startswith("can't be read on: ") for reason in unread)
            assert len(lines) <= rejected  # a shard drawn twice for one place is one line
            assert len(unread) >= 2, name
            assert read == 200 + rejected
            assert all(line["epoch"] == line["position"] // 30 for line in lines)
        strict = open_web(both, bad_sample_budget=0.001, global_batch=20)
        with pytest.raises(DataError, match=r"of 1\d\d samples read .*bad_sample_budget = 0.001"):
            taken(strict, 10)
        strict.close()


def taken(stream, steps: int) -> int:
    return sum(len(stream.take()[0].sample_id) for _ in range(steps))


@pytest.mark.heavy
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_are_streamed(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    spec = write_shards(tmp_path, [10])
    plain = Path(spec.replace("{000..000}", "000"))
    (tmp_path / "packed").mkdir()
    packed = tmp_path / "packed/000.tar"
    packed.write_bytes(pack(plain.read_bytes()))
    assert same(open_web(spec).take(), open_web(str(packed)).take())


def test_words_are_learnt_from_the_shards_that_can_be_read(tmp_path: Path) -> None:
    bad = damaged(tmp_path / "bad")
    spec = "::".join([write_shards(tmp_path, [5]), *map(str, bad.values())])
    data = DataConfig(train=spec, reader="webdataset", epoch_samples=12)
    assert {f"sample {n}" for n in range(5)} <= set(captions_of(data, seed=3, most=100))
    data = DataConfig(train=str(bad["page"]), reader="webdataset", epoch_samples=12)
    with pytest.raises(DataError, match="none of 1 shards can be read: can't be read on"):
        list(captions_of(data, seed=3, most=100))


def test_nothing_to_learn_words_from_is_said_with_the_members(tmp_path: Path) -> None:
    spec = write_shards(tmp_path, [5])
    data = DataConfig(train=spec, captions={"fields": ("nothing",)})
    with pytest.raises(
        DataError, match=r"none of 5 samples .* members png, txt; set data\.captions"
    ):
        list(captions_of(data, seed=3, most=100))


def test_words_are_learnt_from_shards_without_an_index(tmp_path: Path) -> None:
    for number in range(3):
        samples = {f"{number}{n}": {"txt": f"word {number} {n}".encode()} for n in range(4)}
        write_tar(tmp_path / f"{number}.tar", samples | {"bad": {"txt": b"\xff"}})
    data = DataConfig(train=f"{tmp_path}/{{0..2}}.tar", reader="webdataset", epoch_samples=12)
    everything = {f"word {number} {n}" for number in range(3) for n in range(4)}
    once = list(captions_of(data, seed=3, most=100))
    assert set(once) == everything
    assert len(once) == 12
    assert list(captions_of(data, seed=3, most=100)) == once
    assert list(captions_of(data, seed=3, most=5)) == once[:4]  # the fifth is the bad one
