"""CLIP with a frozen teacher from two stores: the same run on any ranks, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.fixtures.emoji import write_shards
from tests.fixtures.vectors import write_vectors
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.tokenize import train_tokenizer
from trainer.errors import CheckpointError, ConfigError
from trainer.recipe import Recipe, load_recipe
from trainer.run import context_of, stream_of
from trainer.store import EmbeddingStore

RUN = """
workdir: {folder}/run
steps: 3
global_batch: 8
micro_batch: 2
deepspeed: ds_configs/zero3.json
recipe:
  name: clip
  distill: {{image_store: {folder}/image, text_store: {folder}/text, logit_scale: 20, weight: 2.0}}
  model:
    image_size: 32
    patch_size: 16
    text_length: 12
    embed_dim: 16
    image: {{width: 32, layers: 2, heads: 2}}
    text: {{width: 32, layers: 2, heads: 2}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
log_every: 1 steps
"""


def config_in(folder: Path, *overrides: str) -> RunConfig:
    spec = write_shards(folder / "shards", count=24, per_shard=12)
    if not (folder / "image").exists():
        write_vectors(folder / "image", spec, dim=10, seed=1, field="image", model="pair")
        write_vectors(folder / "text", spec, dim=10, seed=2, model="pair")
    return parse_run(RUN.format(folder=folder, spec=spec), overrides)


def built(config: RunConfig) -> Recipe:
    tokenizer = train_tokenizer(["a text"], vocab_size=259, length=12)
    return load_recipe(config.recipe, context_of(config, Comm.solo(), tokenizer))


def test_workers_read_the_pair_of_each_sample(tmp_path: Path) -> None:
    config = config_in(tmp_path, "data.workers=1")
    tokenizer = train_tokenizer(["a text"], vocab_size=259, length=12)
    stream = stream_of(config, Comm.solo(), tokenizer, micro_batch=8)
    batch = stream.take()[0]
    stream.close()
    for place, name in enumerate(("image", "text")):
        rows = EmbeddingStore.open(tmp_path / name).rows(batch.sample_id)
        assert batch.texts is not None
        assert torch.equal(batch.texts[:, place], normalize(rows, dim=1))


def train_once(comm: Comm, config: RunConfig) -> int:
    from trainer.loop import train

    return train(config).progress.step


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    restored = Checkpointer(folder / "checkpoints", Comm.solo()).latest()
    assert restored is not None
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return dict(restored.tensors("weights")), [json.loads(line) for line in lines]


def test_any_ranks_split_and_stage_learn_the_same(tmp_path: Path) -> None:
    """One rank with four micro-batches under ZeRO-3, two ranks with two under ZeRO-1."""
    config = config_in(tmp_path)
    other = config_in(tmp_path, f"workdir={tmp_path}/other", "deepspeed=ds_configs/zero1.json")
    run_ranks(train_once, 1, config, timeout_seconds=300)
    run_ranks(train_once, 2, other, timeout_seconds=300)
    ours, theirs = outcome(tmp_path / "run"), outcome(tmp_path / "other")
    assert ours[0].keys() == theirs[0].keys()
    for name, value in ours[0].items():
        if name.endswith("k_proj.bias"):  # no gradient but rounding, which Adam makes steps of
            continue
        torch.testing.assert_close(theirs[0][name], value, rtol=1e-4, atol=1e-5)
    assert len(ours[1]) == 3
    for one, two in zip(ours[1], theirs[1], strict=True):
        found, wanted = (flat(line) for line in (one, two))
        terms = {name for name in found if name.endswith(("distill", "clip", "loss"))}
        assert any("distill" in name for name in terms)
        for name in terms:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4)


def flat(line: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[prefix + key] = float(value)
    return found


@pytest.mark.heavy
def test_mistakes_in_one_sentence(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    spec = config.data.train
    write_vectors(tmp_path / "wide", spec, dim=12, model="pair")
    write_vectors(tmp_path / "several", spec, dim=10, vectors=3, model="pair")
    write_vectors(tmp_path / "long", spec, dim=10, field="long | txt", model="pair")
    write_vectors(tmp_path / "other", spec, dim=10)
    write_vectors(tmp_path / "states", spec, dim=10, model="pair", pooling="mean of 77 tokens")
    stores = (
        f"recipe.distill.image_store={tmp_path}/text",
        f"recipe.distill.text_store={tmp_path}/image",
    )
    for overrides, said in (
        ([f"recipe.distill.text_store={tmp_path}/wide"], "of 10 numbers and .* of 12; both must"),
        ([f"recipe.distill.text_store={tmp_path}/several"], "has 3 vectors a sample"),
        ([f"recipe.distill.text_store={tmp_path}/long"], r"made of long \| txt, and .* are txt"),
        ([f"recipe.distill.text_store={tmp_path}/other"], "two models, whose vectors can't be"),
        ([f"recipe.distill.text_store={tmp_path}/states"], "pooled states.*pooling=projected"),
        (["data.captions.fields=[txt, name]"], "fields are txt, name; the student must read the"),
        (stores, "exchange image_store and text_store"),
    ):
        with pytest.raises(ConfigError, match=said):
            built(config_in(tmp_path, *overrides))
    with pytest.raises(ConfigError, match="weight"):
        config_in(tmp_path, "recipe.distill.weight=0")


def test_a_run_does_not_go_on_with_another_teacher(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    state = dict(built(config).parts["teacher"].state_share())
    built(config).parts["teacher"].load_state_dict(state)
    write_vectors(tmp_path / "other", config.data.train, dim=10, seed=3, model="pair")
    other = built(config_in(tmp_path, f"recipe.distill.text_store={tmp_path}/other"))
    with pytest.raises(CheckpointError, match="teacher text are not those"):
        other.parts["teacher"].load_state_dict(state)


def test_without_a_teacher_nothing_changes(tmp_path: Path) -> None:
    plain = built(config_in(tmp_path, "recipe.distill=null"))
    assert plain.parts == {}
    assert config_in(tmp_path, "recipe.distill=null").recipe.join(0) is None
