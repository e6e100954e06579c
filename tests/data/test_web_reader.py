"""The webdataset reader: the same batches in kind, and pipes only on request."""

from __future__ import annotations

import gc
import io
import tarfile
import warnings
from pathlib import Path

import pytest
import torch

from tests.data.streams import SIDE, open_stream, write_shards
from tests.data.tars import write_tar
from trainer.config import DataConfig
from trainer.data.shards import ShardSet
from trainer.data.vocabulary import captions_of
from trainer.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _files_left_to_the_collector():
    """webdataset closes no file that it opens, and an abandoned stream still holds one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def open_web(spec: str, **config):
    return open_stream(spec, **{"reader": "webdataset", "epoch_samples": 30, **config})


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
    with pytest.raises(DataError, match="webdataset can't read on"):
        open_web(f"{tmp_path}/cut.tar").take()


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
