"""Evaluations and embeddings that processes decode for: the same as without them, to the byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.streams import write_shards
from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.pixels import Pixels
from trainer.errors import ConfigError, DataError
from trainer.evals import samples
from trainer.store import Identity
from trainer.teachers.fill import embed
from trainer.teachers.image import ImageReader


class CornerTeacher:
    """The colour of an image's corner; images are read by a reader of its own."""

    chunk = 100

    def __init__(self) -> None:
        self.reader = ImageReader(Pixels(8), ("png",))

    @property
    def identity(self) -> Identity:
        return Identity(
            teacher="corner", model="m", tokenizer="k", reads="image", pooling="none", dim=3
        )

    def read(self, sample: object) -> Tensor:
        return self.reader.read(sample)

    def encode(self, items: list[Tensor]) -> Tensor:
        return torch.stack([item[:, 0, 0].float() for item in items])[:, None]

    def stand_by(self) -> None: ...


class WithoutReader(CornerTeacher):
    def __init__(self) -> None:
        super().__init__()
        del self.reader


@pytest.mark.heavy
def test_processes_that_read_ahead_change_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(samples, "_FEW_BLOCKS", 1)
    spec = write_shards(tmp_path, [130, 0, 70])
    damaged = tmp_path / "002.tar"
    data = bytearray(damaged.read_bytes())
    data[600] ^= 1  # in the first image
    damaged.write_bytes(bytes(data))

    def blocks(workers: int) -> list[object]:
        config = DataConfig(train=spec, workers=workers, bad_sample_budget=0.05)
        return list(samples.read_blocks(spec, size=8, limit=150, data=config, comm=Comm.solo()))

    for here, there in zip(blocks(0), blocks(2), strict=True):
        assert torch.equal(here.images, there.images)
        assert torch.equal(here.sample_id, there.sample_id)
        assert torch.equal(here.usable, there.usable)
        assert here.records == there.records
    config = DataConfig(train=spec, workers=2, bad_sample_budget=0.0)
    with pytest.raises(DataError, match=r"1 of 200 samples .* can't be used"):
        list(samples.read_blocks(spec, size=8, limit=None, data=config, comm=Comm.solo()))
    with pytest.raises(ConfigError, match="workers read images ahead"):
        embed(spec, tmp_path / "none", teacher=WithoutReader(), comm=Comm.solo(), workers=1)
    for workers in (0, 2):
        out = tmp_path / f"store{workers}"
        done = embed(spec, out, teacher=CornerTeacher(), comm=Comm.solo(), workers=workers)
        assert (done.computed, done.skipped) == (3, 1)
    for file in sorted(os.listdir(tmp_path / "store0")):
        one, other = ((tmp_path / f"store{n}" / file).read_bytes() for n in (0, 2))
        assert one == other
