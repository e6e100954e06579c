"""A teacher dealt to the ranks by ZeRO-3 writes the bytes that the whole model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.teachers.small_teachers import save_llama, save_vit
from trainer.comm import Comm
from trainer.errors import ConfigError, DataError
from trainer.programs.embed import open_teacher
from trainer.teachers.batches import Budget
from trainer.teachers.fill import embed, verify
from trainer.teachers.spec import TeacherSpec, load_teacher

TEXTS = {
    "facets": {"prompts": "flame", "pooling": "last", "layer": 3, "batch_tokens": 500},
    "plain": {"batch_tokens": 40},
}
IMAGES = {"kind": "image", "pooling": "cls", "batch_images": 4}


def spec_of(folder: Path, **changes: Any) -> TeacherSpec:
    return TeacherSpec(model=str(folder), length=20, **changes)


def specs_in(folder: Path, **changes: Any) -> dict[str, TeacherSpec]:
    specs = {name: spec_of(folder / "llm", **TEXTS[name], **changes) for name in TEXTS}
    return {**specs, "images": spec_of(folder / "vit", **IMAGES, **changes)}


def held(model: nn.Module) -> tuple[int, int]:
    """Numbers of the weights that lie on this rank between passes, and of all weights."""
    parameters: list[Any] = list(model.parameters())
    own = sum(p.numel() + p.ds_tensor.numel() for p in parameters)
    return own, sum(p.ds_numel for p in parameters)


def build(comm: Comm, folder: Path, shards: str, out: Path) -> dict[str, tuple[int, int, int]]:
    """Shards computed, and what `held` says, by teacher."""
    found = {}
    for name, spec in specs_in(folder, sharded=True).items():
        teacher: Any = open_teacher(spec, comm)
        done = embed(shards, out / name, teacher=teacher, comm=comm)
        assert verify(shards, out / name, teacher=teacher, comm=comm) == done.checked
        states = teacher.model.states if name == "images" else teacher.states
        found[name] = (done.computed, *held(states.model))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_teacher_writes_the_same_bytes(tmp_path, world_size):
    """Five shards for two ranks: one computes three of them, the other runs along meanwhile."""
    save_llama(tmp_path / "llm")
    save_vit(tmp_path / "vit")
    shards = write_shards(tmp_path / "shards", count=43, per_shard=9)
    for name, spec in specs_in(tmp_path).items():
        embed(shards, tmp_path / "whole" / name, teacher=load_teacher(spec), comm=Comm.solo())
    found = run_ranks(build, world_size, tmp_path, shards, tmp_path / "sharded")
    for name in (*TEXTS, "images"):
        assert contents(tmp_path / "sharded" / name) == contents(tmp_path / "whole" / name)
        for rank in found:
            computed, own, total = rank[name]
            assert computed == 5
            assert own <= total / world_size + 100, "padded by less than a number a weight"


class Failing:
    """A teacher that can't go on at the second shard of rank 1."""

    def __init__(self, teacher: Any, comm: Comm) -> None:
        self.teacher, self.comm, self.calls = teacher, comm, 0
        self.identity, self.chunk = teacher.identity, teacher.chunk
        self.read, self.stand_by = teacher.read, teacher.stand_by

    def encode(self, items: Any) -> torch.Tensor:
        self.calls += 1
        if self.comm.rank == 1 and self.calls > 2:
            raise DataError("the disk is full")
        vectors: torch.Tensor = self.teacher.encode(items)
        return vectors


def build_until_it_fails(comm: Comm, spec: TeacherSpec, shards: str, out: str) -> str:
    with pytest.raises(DataError) as caught:
        embed(shards, out, teacher=Failing(open_teacher(spec, comm), comm), comm=comm)
    return str(caught.value)


def test_a_rank_that_fails_helps_the_others_to_finish_and_all_say_why(tmp_path):
    llm, shards = save_llama(tmp_path / "llm"), write_shards(tmp_path / "s", count=43, per_shard=9)
    spec = spec_of(llm, **TEXTS["plain"], sharded=True)
    found = run_ranks(build_until_it_fails, 2, spec, shards, str(tmp_path / "out"))
    assert found == ["rank 1: the disk is full"] * 2
    assert len(list((tmp_path / "out").glob("*.vectors"))) == 4


def test_what_can_not_be_sharded_says_so(tmp_path):
    llm = save_llama(tmp_path / "llm")
    with pytest.raises(ConfigError, match=r"only tools/embed\.py shards teachers"):
        load_teacher(spec_of(llm, sharded=True))
    with pytest.raises(ConfigError, match="spread is on too"):
        load_teacher(spec_of(llm, sharded=True, spread=True), shard=lambda model: model)

    def hungry(batch: list[int]) -> torch.Tensor:
        return torch.empty(2**50)

    with pytest.raises(SystemExit, match="set batch_tokens or batch_images to 32"):
        Budget(64, shared=True).run([3, 4], hungry)
