"""CLIP whose image tower also learns classes through a sharded head: a YAML alone says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.recipes.test_clip import outcome
from tests.recipes.tiny_run import tiny_run
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import ConfigError

KEYS = """
prototypes:
  classes: [subgroup, group]
  weight: 0.5
  figures_every: 1
  head: {learning_rate: 0.01}
"""


def config_in(folder: Path, name: str, spec: str, *overrides: str) -> RunConfig:
    return tiny_run(folder, name, spec, *overrides, keys=KEYS)


def train_all(comm: Comm, configs: list[RunConfig], cut: tuple[Path, Path] | None) -> None:
    """Each run in turn; before the last one its folder is made: another's, as it was at step 2."""
    from trainer.loop import train

    for number, config in enumerate(configs):
        if cut is not None and number == len(configs) - 1:
            if comm.is_main:
                shutil.copytree(*cut)
                last = Checkpointer(cut[1] / "checkpoints", Comm.solo()).latest()
                assert last is not None
                assert last.step == 4
                shutil.rmtree(last.folder)
            comm.barrier()
        train(config)


def values(folder: Path) -> list[dict[str, Any]]:
    return [line["values"] for line in outcome(folder)[1]]


def parts(folder: Path) -> dict[str, torch.Tensor]:
    restored = Checkpointer(folder / "checkpoints", Comm.solo()).latest()
    assert restored is not None
    return dict(restored.tensors("parts"))


def test_the_term_is_a_yaml_s_choice_equal_on_any_ranks_and_goes_on(tmp_path: Path) -> None:
    """With a weight of zero the model is plain CLIP's to the last bit, and the head rests."""
    spec = write_shards(tmp_path / "shards", count=24, per_shard=12)
    alone = config_in(tmp_path, "alone", spec)
    pair, again = config_in(tmp_path, "pair", spec), config_in(tmp_path, "again", spec)
    plain = config_in(tmp_path, "plain", spec, "recipe.prototypes=null")
    zero = config_in(tmp_path, "zero", spec, "recipe.prototypes.weight=0")
    run_ranks(train_all, 1, [alone], None, timeout_seconds=300)
    cut = (pair.workdir, again.workdir)
    run_ranks(train_all, 2, [plain, zero, pair, again], cut, timeout_seconds=600)

    for one, two in zip(values(alone.workdir), values(pair.workdir), strict=True):
        assert {"clip", "mlcd", "positive_cosine", "negative_cosine"} <= one.keys()
        assert one["loss"] == pytest.approx(one["clip"] + 0.5 * one["mlcd"], rel=1e-6)
        for name in ("loss", "clip", "mlcd", "positive_cosine", "active_rows"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
    for one, two in zip(values(plain.workdir), values(zero.workdir), strict=True):
        assert one["clip"] == two["clip"] == two["loss"]
        assert two["mlcd"] > 0

    weights = {run.workdir.name: outcome(run.workdir)[0] for run in (plain, zero, pair, again)}
    for one, two, equal in (
        ("plain", "zero", True),
        ("pair", "again", True),
        ("zero", "pair", False),
    ):
        same = [torch.equal(value, weights[two][name]) for name, value in weights[one].items()]
        assert all(same) if equal else not all(same)
    heads, resumed = parts(pair.workdir), parts(again.workdir)
    assert heads.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in heads.items())
    assert values(pair.workdir) == values(again.workdir)
    (rows,) = [name for name in heads if name.startswith("head/rows")][:1]
    assert not torch.equal(heads[rows], parts(zero.workdir)[rows])


def test_mistakes_in_the_section_are_named(tmp_path: Path) -> None:
    for overrides, said in (
        (["recipe.prototypes.weight=-1"], "weight"),
        (["recipe.prototypes.classes=[]"], "either `labels`"),
        (["recipe.prototypes.loss=slots", "recipe.prototypes.drop_unlabelled=true"], "not read"),
    ):
        with pytest.raises(ConfigError, match=said):
            config_in(tmp_path, "run", "nothing.tar", *overrides)
