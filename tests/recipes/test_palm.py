"""PALM as a run: the published program's steps, any number of ranks, and going on with another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.losses.rank_cases import golden, golden_names
from tests.losses.test_palm import class_major
from tests.ranks import run_ranks
from tests.recipes.test_mlcd import changed, shards_without_captions
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.labels import ClusterLabels
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.recipe import load_recipe
from trainer.recipes.palm import Config, Recipe
from trainer.run import context_of
from trainer.types import Batch, Features

RUN = """
workdir: {folder}/run
steps: 4
global_batch: 12
deepspeed: ds_configs/zero3.json
recipe:
  name: palm
  model:
    image_size: 32
    patch_size: 16
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    head: {{hidden: 24, dim: 8, norm: layer}}
  classes: subgroup
  momentum: 0.8
  prototypes_per_class: 3
  kept: 2
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003, warmup_steps: 2}}
log_every: 1 steps
save_every: 2 steps
keep_checkpoints: 3
"""
SOLO = Comm.solo()
FORMS = ("paper", "code")
UNLABELLED = (
    *("recipe.classes=null", "recipe.unlabelled=5", "recipe.prototypes_per_class=6"),
    *("recipe.parity=code", "recipe.contrast_weight=0"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("palm")
    return parse_run(RUN.format(folder=folder, spec=shards_without_captions(folder)))


def built(config: RunConfig) -> Recipe:
    return load_recipe(config.recipe, context_of(config, SOLO, None))


@pytest.mark.parametrize("file", golden_names("palm/step_*.npz"))
def test_three_steps_of_the_published_program_through_the_recipe(base, tmp_path, file):
    """Losses, gradients of every view and the table that the next step begins with; a step that is
    not applied leaves it."""
    arrays = {name: torch.as_tensor(value) for name, value in golden(file).items()}
    count, per_class, dim = (
        int(arrays[name]) for name in ("num_classes", "protos_per_class", "feat_dim")
    )
    ids = torch.as_tensor(range(count))
    labels = tmp_path / "labels"
    real = built(base).labels.ids[:count]
    ClusterLabels(torch.cat([ids, real]), torch.cat([ids, ids])).save(labels)
    config = changed(
        base,
        *("recipe.classes=null", f"recipe.labels={labels}", "recipe.parity=code"),
        f"recipe.prototypes_per_class={per_class}",
        f"recipe.kept={int(arrays['topk']) or per_class}",
        f"recipe.momentum={float(arrays['proto_momentum'])}",
        f"recipe.temperature={float(arrays['temperature'])}",
        f"recipe.contrast_weight={float(arrays['lambda_pcon'])}",
        f"recipe.model.head.dim={dim}",
    )
    recipe = built(config)
    table = recipe.prototypes
    table.rows = class_major(arrays["s0_protos_before"], count)
    for step in range(int(arrays["num_steps"])):
        said = {name[3:]: value for name, value in arrays.items() if name.startswith(f"s{step}_")}
        views = said["features"].clone().requires_grad_()
        batch = Batch(None, None, None, said["labels"])
        for applied in (False, True):
            losses = recipe.losses(Features(more={"views": views}), batch, step)
            table.after_step(step, applied=applied, learning_rate_factor=1.0)
            expected = class_major(said["protos_after" if applied else "protos_before"], count)
            torch.testing.assert_close(table.rows, expected, rtol=1e-9, atol=1e-10)
        for ours, theirs in (
            ("likelihood", "loss_mle"),
            ("contrast", "loss_contrast"),
        ):
            torch.testing.assert_close(losses[ours], said[theirs], rtol=1e-7, atol=0)
        torch.testing.assert_close(losses.total, said["loss_total"], rtol=1e-7, atol=0)
        (gradient,) = torch.autograd.grad(losses.total, views)
        torch.testing.assert_close(gradient, said["grad_total"], rtol=1e-6, atol=1e-9)


@pytest.mark.heavy
def test_mistakes_are_named_before_anything_is_trained(base, tmp_path):
    for overrides, message in [
        (["recipe.classes=null"], "either `labels`"),
        (["recipe.labels=somewhere"], "either `labels`"),
        (["recipe.prototypes_per_class=1"], "contrast_weight=0"),
        (["recipe.temperature=0"], "temperature"),
        (["recipe.unlabelled=5", "recipe.prototypes_per_class=6"], "either `labels`"),
        (["recipe.classes=null", "recipe.unlabelled=5"], "prototypes_per_class is not read"),
        ([*UNLABELLED, "recipe.parity=paper"], "parity: code"),
        ([*UNLABELLED, "recipe.contrast_weight=1"], "contrast_weight: 0"),
        ([*UNLABELLED, "recipe.views=1"], "views: 2 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            changed(base, *overrides)
    with pytest.raises(ConfigError, match="json key 'nothing'"):
        built(changed(base, "recipe.classes=nothing"))
    ids = torch.arange(5)
    ClusterLabels(ids, ids).save(tmp_path / "others")
    with pytest.raises(DataError, match="none of"):
        built(changed(base, "recipe.classes=null", f"recipe.labels={tmp_path}/others"))
    state = dict(built(base).prototypes.state_share())
    with pytest.raises(CheckpointError, match="of 3 prototypes of 8"):
        built(changed(base, "recipe.prototypes_per_class=2")).prototypes.load_state_dict(state)


def test_without_labels_every_sample_counts_and_prototypes_follow(base):
    recipe = built(changed(base, *UNLABELLED))
    views = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=2).requires_grad_()
    batch = Batch(torch.zeros(4, 3, 32, 32), None, None, torch.arange(4))
    before = recipe.prototypes.rows.clone()
    losses = recipe.losses(Features(image=None, more={"views": views}), batch, 0)
    assert float(losses["labelled"]) == 1
    losses.total.backward()
    assert float(views.grad.abs().sum()) > 0
    recipe.prototypes.after_step(0, applied=True, learning_rate_factor=1.0)
    assert before.shape == (1, 5, 8)
    assert not torch.equal(recipe.prototypes.rows, before)


def test_one_view_without_a_head_is_a_sample_too(base):
    config = changed(base, "recipe.views=1", "recipe.model.head=null")
    assert isinstance(config.recipe, Config)
    recipe = built(config)
    batch = Batch(torch.randn(4, 3, 32, 32), None, None, recipe.labels.ids[:4])
    losses = recipe.losses(recipe.model(batch), batch, 0)
    assert torch.isfinite(losses.total)
    assert recipe.prototypes.rows.shape[1:] == (3, 16)


def train_each(comm: Comm, configs: list[RunConfig]) -> int:
    from trainer.loop import train

    return [train(config).progress.step for config in configs][-1]


def state_of(folder: Path) -> dict[str, Tensor]:
    restored = Checkpointer(folder / "checkpoints", SOLO).latest()
    assert restored is not None
    parts = {n: v for n, v in restored.tensors("parts") if n.startswith("prototypes/rows/")}
    table = torch.cat([parts[name] for name in sorted(parts)])
    return dict(restored.tensors("weights")) | {"prototypes": table}


def test_any_number_of_ranks_moves_the_same_prototypes_and_goes_on_at_another(base, tmp_path):
    """ZeRO-3 on two ranks in both forms; one rank in micro-batches; one rank from their middle."""
    forms = [changed(base, f"workdir={tmp_path}/{p}", f"recipe.parity={p}") for p in FORMS]
    run_ranks(train_each, 2, forms, timeout_seconds=200)
    alone = []
    for form, config in zip(FORMS, forms, strict=True):
        shutil.copytree(tmp_path / form, tmp_path / f"{form}_moved")
        (last,) = (tmp_path / f"{form}_moved" / "checkpoints").glob("*4*")
        shutil.rmtree(last)
        alone.append(changed(config, f"workdir={tmp_path}/{form}_moved"))
        alone.append(changed(config, f"workdir={tmp_path}/{form}_alone", "micro_batch=6"))
    run_ranks(train_each, 1, alone, timeout_seconds=200)
    for form in FORMS:
        expected = state_of(tmp_path / form)
        start = built(base).prototypes.rows.flatten(0, 1)
        assert not torch.allclose(expected["prototypes"], start, atol=1e-2)
        for other in ("moved", "alone"):
            found = state_of(tmp_path / f"{form}_{other}")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
