"""`clip`, `siglip`, `protoclip` and `mlcd` take known groups by a key; no other recipe does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.recipes.test_clip import outcome
from tests.recipes.test_clip_prototypes import parts, train_all, values
from tests.recipes.tiny_run import PROTOCLIP, tiny_run
from trainer.config import RunConfig
from trainer.errors import ConfigError

KEYS = """
known_groups:
  - {key: subgroup, effect: remove, weight: 0.5}
  - {key: group, effect: keep, told_by: linear, layer: {learning_rate: 0.1}}
  - {key: group_id, effect: remove, told_by: value, weight: 0}
"""
TERMS = ("known_group/subgroup", "known_group/group", "known_group/group_id")
MLCD = (
    "recipe={name: mlcd, classes: [subgroup], known_groups: [{key: group, effect: remove}], "
    "model: {image_size: 32, patch_size: 16, embed_dim: 16, image: {width: 32, layers: 1, "
    "heads: 2}}}"
)


def config_in(folder: Path, name: str, spec: str, *overrides: str) -> RunConfig:
    return tiny_run(folder, name, spec, *overrides, keys=KEYS)


def weights_of(config: RunConfig) -> dict[str, Any]:
    return outcome(config.workdir)[0]


def test_known_groups_are_a_yaml_s_choice_equal_on_any_ranks_and_go_on(tmp_path: Path) -> None:
    spec = write_shards(tmp_path / "shards", count=24, per_shard=12)
    alone = config_in(tmp_path, "alone", spec)
    pair, again = config_in(tmp_path, "pair", spec), config_in(tmp_path, "again", spec)
    plain = config_in(tmp_path, "plain", spec, "recipe.known_groups=[]")
    watched = config_in(
        tmp_path, "watched", spec, "recipe.known_groups=[{key: group, effect: keep, weight: 0}]"
    )
    others = [
        config_in(tmp_path, "siglip", spec, "recipe.name=siglip", "recipe.model.bias=true"),
        config_in(tmp_path, "protoclip", spec, *PROTOCLIP),
        config_in(tmp_path, "mlcd", spec, MLCD),
    ]
    run_ranks(train_all, 1, [alone], None, timeout_seconds=300)
    cut = (pair.workdir, again.workdir)
    run_ranks(train_all, 2, [*others, plain, watched, pair, again], cut, timeout_seconds=900)

    for one, two in zip(values(alone.workdir), values(pair.workdir), strict=True):
        assert one["loss"] == pytest.approx(one["clip"] + sum(one[t] for t in TERMS), rel=1e-5)
        for name in ("loss", "clip", *TERMS):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
    # A head that only looks moves nothing, and still learns.
    for one, two in zip(values(plain.workdir), values(watched.workdir), strict=True):
        assert one["clip"] == two["clip"]
    unmoved = weights_of(watched)
    assert all(torch.equal(v, unmoved[name]) for name, v in weights_of(plain).items())
    assert any(not torch.equal(v, unmoved[name]) for name, v in weights_of(pair).items())
    # Going on from step 2 ends at the same bytes, heads and norms too.
    resumed = weights_of(again)
    assert all(torch.equal(value, resumed[name]) for name, value in weights_of(pair).items())
    own, theirs = parts(pair.workdir), parts(again.workdir)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert float(own["balance_subgroup/squares"].min()) > 0
    for config in others:
        said = values(config.workdir)[-1]
        assert any(name.startswith("known_group/") for name in said), config.workdir.name


def test_mistakes_are_named(tmp_path: Path) -> None:
    for overrides, said in (
        (["recipe.known_groups.0.weight=-1"], "weight"),
        (["recipe.known_groups.1.key=subgroup"], "give it once"),
        (["recipe.known_groups.1.scale=3"], "not read"),
        (["recipe.name=superclip"], "known_groups"),
    ):
        with pytest.raises(ConfigError, match=said):
            config_in(tmp_path, "run", "nothing.tar", *overrides)


def test_a_key_that_tells_nothing_apart_or_is_no_number_is_refused(tmp_path: Path) -> None:
    spec = write_shards(tmp_path / "shards", count=8, per_shard=8)
    for group, said in (
        ("{key: nonsense, effect: keep}", "has 0 values"),
        ("{key: subgroup, effect: keep, told_by: value}", "is no number"),
    ):
        config = config_in(tmp_path, "run", spec, f"recipe.known_groups=[{group}]")
        with pytest.raises(ConfigError, match=said):
            run_refused(config)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def run_refused(config: RunConfig) -> None:
    """The recipe alone, as a run builds it."""
    from trainer.comm import Comm
    from trainer.parts.known_groups import KnownGroups
    from trainer.recipe import Context

    context = Context(
        Comm.solo(), None, 0, config.global_batch, config.steps, config.workdir, config.data
    )
    KnownGroups(config.recipe, context, dim=16)
