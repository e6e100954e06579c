"""TinyCLIP: what is inherited, gates in a run, cuts in the middle of it, and going on anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import folders
from tests.models.small import small_batch, word_tokenizer
from tests.ranks import run_ranks
from tests.recipes.test_clip import config_in
from tests.recipes.test_live_teacher import batch_of, built, pair
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.export.native import load_exported
from trainer.export.transformers_folder import export_model
from trainer.losses.contrastive import info_nce
from trainer.losses.distill import soft_distillation
from trainer.programs.workdir import evaluate_workdir, logged_results, open_workdir

SOLO = Comm.solo()
STAGES = "{stages: [{steps: 2, target: 0.3, settle: 1}, {steps: 2, target: 0.6}]"


def config_of(folder: Path, *overrides: str, gates: str | None = None) -> RunConfig:
    path = folder / "pair"
    if not path.exists():
        pair(path, folders.clip)
    changes = [f"recipe.gates={gates}"] if gates else []
    return config_in(
        folder,
        f"recipe={{name: tinyclip, distill: {{model: {path}}}, model: {{image_size: 32, "
        f"patch_size: 16, text_length: 12, embed_dim: 24, tokenizer: {path}, "
        "image: {width: 32, layers: 2, heads: 4}, text: {width: 32, layers: 2, heads: 4}}}",
        *changes,
        *overrides,
    )


@pytest.mark.heavy
def test_the_first_step_of_a_pair_that_is_its_own_teacher(tmp_path: Path) -> None:
    """Student and teacher agree: nothing is above the least value, and no gradient is left."""
    path, model = pair(tmp_path / "pair", folders.clip)
    towers = f"{{path: {path}}}"
    config = config_of(
        tmp_path,
        f"recipe.model={{image_size: 32, text_length: 12, embed_dim: {model.projection_dim}, "
        f"image: {towers}, text: {towers}}}",
    )
    recipe, batch = built(config), batch_of()
    losses = recipe.losses(recipe.model(batch), batch, 0)
    losses.total.backward()
    assert abs(float(losses["distill_divergence"])) < 1e-5
    assert losses.weights["clip"] == 0.0
    largest = max(
        float(p.grad.abs().max()) for p in recipe.model.parameters() if p.grad is not None
    )
    assert largest < 1e-4


def test_its_other_term_is_clip_to_the_bit_and_a_sure_teacher_says_the_same(
    tmp_path: Path,
) -> None:
    recipe = built(config_of(tmp_path, "recipe.weight=1"))
    batch = batch_of()
    features = recipe.model(batch)
    image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
    losses = recipe.losses(features, batch, 0)
    assert torch.equal(losses["clip"], info_nce(image, text, scale, SOLO))
    assert losses.weights["clip"] == 1.0
    sure = torch.eye(len(image))
    soft = soft_distillation(image, text, scale, sure, sure, 1e4, SOLO).loss
    torch.testing.assert_close(soft, losses["clip"], rtol=1e-6, atol=0)


@pytest.mark.heavy
def test_a_fixed_scale_is_the_students_whatever_it_learns(tmp_path: Path) -> None:
    fixed = built(config_of(tmp_path, "recipe.student_scale=50"))
    learned = built(config_of(tmp_path, "recipe.model.logit_scale_init=50"))
    batch = batch_of()
    losses = [recipe.losses(recipe.model(batch), batch, 0) for recipe in (fixed, learned)]
    torch.testing.assert_close(losses[0]["distill"], losses[1]["distill"], rtol=1e-5, atol=0)
    for each in losses:
        each.total.backward()
    still, moved = (recipe.model.logit_scale.shift.grad for recipe in (fixed, learned))
    assert float(still.abs()) == 0.0 < float(moved.abs())


@pytest.mark.heavy
@pytest.mark.parametrize("width", ["leading", "magnitude"])
def test_a_student_begins_with_a_part_of_the_teachers_weights(tmp_path: Path, width: str) -> None:
    path, model = pair(tmp_path / "pair", folders.clip)
    vision = model.config.vision_config
    head_dim = vision.hidden_size // vision.num_attention_heads
    half = f"{{width: {head_dim}, layers: 1, heads: 1, mlp_width: 8}}"
    config = config_of(
        tmp_path,
        f"recipe.model={{image_size: {vision.image_size}, patch_size: {vision.patch_size}, "
        f"text_length: {model.config.text_config.max_position_embeddings}, tokenizer: {path}, "
        f"embed_dim: {model.config.projection_dim}, image: {half}, text: {half}}}",
        f"recipe.inherit={{path: {path}, width: {width}}}",
    )
    student = built(config).model
    assert student.image.backbone.config.hidden_act == vision.hidden_act == "quick_gelu"
    large = model.vision_model.pre_layrnorm.weight
    small = student.image.backbone.pre_layrnorm.weight
    assert set(small.tolist()) <= set(large.tolist())
    if width == "leading":
        attention = model.text_model.encoder.layers[0].self_attn.q_proj.weight
        ours = student.text.backbone.encoder.layers[0].self_attn.q_proj.weight
        assert torch.equal(ours, attention[:head_dim, :head_dim])
        assert torch.equal(
            student.image.projection.weight, model.visual_projection.weight[:, :head_dim]
        )
    with pytest.raises(ConfigError, match="must be those of the larger pair"):
        built(config_of(tmp_path, "recipe.model.embed_dim=9", f"recipe.inherit={{path: {path}}}",
                        f"recipe.model.image={half}", f"recipe.model.text={half}"))  # fmt: skip


@pytest.mark.heavy
def test_mistakes_are_told_before_anything_runs(tmp_path: Path) -> None:
    for gates, said in (
        ("{stages: []}", "stages"),
        ("{stages: [{steps: 2, target: 0.5}, {steps: 2, target: 0.4}]}", "targets must grow"),
        ("{stages: [{steps: 2, target: 1.5}]}", "target"),
    ):
        with pytest.raises(ConfigError, match=said):
            config_of(tmp_path, gates=gates)
    with pytest.raises(ConfigError, match="neither may be frozen"):
        config_of(tmp_path, "recipe.model.text.trained=false", gates=STAGES + "}")
    path, _ = pair(tmp_path / "other", folders.clip)
    added = f"recipe.model.text={{path: {path}, lora: {{rank: 2}}}}"
    with pytest.raises(ConfigError, match="gates cut whole weights"):
        config_of(tmp_path, added, gates=STAGES + "}")
    with pytest.raises(ConfigError, match="distill"):
        config_in(tmp_path, "recipe={name: tinyclip}")
    word_tokenizer(("[end]", "[pad]", "[begin]")).save_pretrained(path)
    inherits = f"recipe.inherit={{path: {path}}}"
    with pytest.raises(ConfigError, match="another tokenizer, so its token embeddings"):
        built(config_of(tmp_path, inherits))
    word_tokenizer().save_pretrained(path)
    with pytest.raises(ConfigError, match=r"set model\.image\.activation=quick_gelu"):
        built(config_of(tmp_path, inherits, "recipe.model.image.activation=gelu"))


def train_each(comm: Comm, *configs: RunConfig) -> int:
    from trainer.loop import train

    return [train(config).progress.step for config in configs][-1]


def train_and_go_on(
    comm: Comm, one: RunConfig, others: list[RunConfig], again: dict[int, RunConfig]
) -> None:
    """`again` go on from what `one` had saved at these steps."""
    train_each(comm, one, *others)
    for at, config in again.items():
        up_to(at, one.workdir, config.workdir)
        train_each(comm, config)


def up_to(step: int, source: Path, folder: Path) -> None:
    """A copy of a run as it was when it had saved this step."""
    shutil.copytree(source, folder)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def saved(folder: Path) -> dict[str, dict[str, Tensor]]:
    restored = Checkpointer(folder / "checkpoints", SOLO).latest()
    assert restored is not None
    return {kind: dict(restored.tensors(kind)) for kind in ("weights", "moments")}


def stages_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("stage", "gates", "cut") if key in line}
        for line in lines
        if line["event"] == "stage"
    ]


def test_gates_learn_and_the_model_shrinks_twice_and_goes_on_anywhere(tmp_path: Path) -> None:
    """Two ranks under ZeRO-3 with checkpointing, one under ZeRO-0, and one that goes on from every
    phase with what two ranks saved: the same small model. One rank that goes on from the middle of
    its own run, at a cut and in every phase: the same bits."""
    gates = STAGES + ", learning_rate: 3.0, ramp: 0.5, multiplier: 60}"
    common = [
        *("steps=7", "save_every=1 steps", "keep_checkpoints=9", "optim.learning_rate=0.001"),
        f'evals=[{{name: zero_shot, label: names, data: "{tmp_path}/shards/*.tar", '
        "target: subgroup}]",
    ]
    one = config_of(tmp_path, *common, "deepspeed=ds_configs/zero0.json", gates=gates)
    two = config_of(
        tmp_path, *common, f"workdir={tmp_path}/two", "gradient_checkpointing=true", gates=gates
    )
    run_ranks(train_each, 2, two, timeout_seconds=800)
    moved, again = [], {}
    for at in (1, 3, 5):
        up_to(at, tmp_path / "two", tmp_path / f"from-{at}")
        moved.append(config_of(tmp_path, *common, f"workdir={tmp_path}/from-{at}", gates=gates))
    for at in (1, 2, 4, 6):
        place = f"workdir={tmp_path}/again-{at}"
        again[at] = config_of(
            tmp_path, *common, place, "deepspeed=ds_configs/zero0.json", gates=gates
        )
    run_ranks(train_and_go_on, 1, one, moved, again, timeout_seconds=800)
    whole = saved(tmp_path / "run")
    for at in again:
        same = saved(tmp_path / f"again-{at}")
        for kind in ("weights", "moments"):
            assert same[kind].keys() == whole[kind].keys()
            assert all(torch.equal(same[kind][key], value) for key, value in whole[kind].items())
    wanted = saved(tmp_path / "two")
    for name in ("run", "from-1", "from-3", "from-5"):
        found = saved(tmp_path / name)
        for kind in ("weights", "moments"):
            assert found[kind].keys() == wanted[kind].keys(), (name, kind)
            for key, value in wanted[kind].items():
                assert found[kind][key].shape == value.shape, (name, key)
                if key.endswith("k_proj.bias"):
                    continue  # no gradient but rounding, which Adam makes steps of
                torch.testing.assert_close(
                    found[kind][key],
                    value,
                    rtol=2e-3,
                    atol=3e-5,
                )
    trained = open_workdir(tmp_path / "two", SOLO)
    small = sum(p.numel() for p in trained.model.parameters())
    large = sum(p.numel() for p in built(config_of(tmp_path)).model.parameters())
    assert small < 0.8 * large
    first, cut, second, last = stages_of(tmp_path / "two")
    assert (first["gates"], second["gates"]) == ("learn", "learn")
    assert 0 < cut["cut"] < last["cut"]
    assert stages_of(tmp_path / "run") == [first, cut, second, last]
    assert [event["stage"] for event in (first, cut, second, last)] == [1, 1, 2, 2]
    assert logged_results(tmp_path / "two")["names"] == pytest.approx(
        evaluate_workdir(tmp_path / "two", SOLO)["names"]
    )
    export_model(trained.model, trained.tokenizer, tmp_path / "exported")
    again, _ = load_exported(tmp_path / "exported")
    assert torch.equal(again(small_batch()).image, trained.model(small_batch()).image)
    up_to(1, tmp_path / "two", tmp_path / "middle")
    gated = open_workdir(tmp_path / "middle", SOLO).model
    with pytest.raises(ConfigError, match="its gates are still learning"):
        export_model(gated, trained.tokenizer, tmp_path / "gated")
    batch = small_batch()
    with torch.no_grad():
        masked = gated(batch).image
        for module in gated.image.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        assert not torch.equal(masked, gated(batch).image)


@pytest.mark.slow
def test_four_ranks_cut_the_same_model_and_go_on_from_one_in_every_phase(tmp_path: Path) -> None:
    """ZeRO-2 with checkpointing, and ZeRO-3 and ZeRO-0 from a phase in which gates learn, one that
    settles, and one that has been cut twice."""
    gates = STAGES + ", learning_rate: 3.0, ramp: 0.5, multiplier: 60}"
    common = [
        *("steps=7", "save_every=1 steps", "keep_checkpoints=9", "optim.learning_rate=0.001"),
        "gradient_checkpointing=true",
    ]
    run_ranks(train_each, 1, config_of(tmp_path, *common, gates=gates), timeout_seconds=900)
    cases = [("whole", None, 2), ("from-1", 1, 3), ("from-2", 2, 0), ("from-5", 5, 3)]
    for name, at, _ in cases:
        if at is None:
            continue
        up_to(at, tmp_path / "run", tmp_path / name)
    four = [
        config_of(
            *(tmp_path, *common, f"workdir={tmp_path}/{name}", "micro_batch=2"),
            f"deepspeed=ds_configs/zero{stage}.json",
            gates=gates,
        )
        for name, _, stage in cases
    ]
    run_ranks(train_each, 4, *four, timeout_seconds=900)
    wanted = saved(tmp_path / "run")["weights"]
    for name, *_ in cases:
        found = saved(tmp_path / name)["weights"]
        assert found.keys() == wanted.keys(), name
        for key, value in wanted.items():
            if not key.endswith("k_proj.bias"):  # no gradient but rounding
                torch.testing.assert_close(found[key], value, rtol=2e-3, atol=3e-5)


def train_and_from_every_phase(comm: Comm, whole: RunConfig, again: dict[int, RunConfig]) -> None:
    """`again` go on from what the whole run had saved at these steps."""
    train_each(comm, whole)
    for at, config in again.items():
        if comm.is_main:
            up_to(at, whole.workdir, config.workdir)
        comm.barrier()
        train_each(comm, config)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_go_on_to_the_same_bits_from_every_phase(tmp_path: Path, stage: int) -> None:
    """While gates learn, at a cut, after it, as the model settles, and in the second stage."""
    gates = STAGES + ", learning_rate: 3.0, ramp: 0.5, multiplier: 60}"

    def run(name: str) -> RunConfig:
        return config_of(
            *(tmp_path, "steps=7", "save_every=1 steps", "keep_checkpoints=9"),
            *("optim.learning_rate=0.001", f"workdir={tmp_path}/{name}"),
            *("gradient_checkpointing=true", f"deepspeed=ds_configs/zero{stage}.json"),
            gates=gates,
        )

    again = {at: run(f"from-{at}") for at in (1, 2, 3, 4, 5, 6)}
    run_ranks(train_and_from_every_phase, 2, run("whole"), again, timeout_seconds=900)
    whole = saved(tmp_path / "whole")
    for at in again:
        found = saved(tmp_path / f"from-{at}")
        for kind, wanted in whole.items():
            assert found[kind].keys() == wanted.keys()
            assert all(torch.equal(found[kind][key], value) for key, value in wanted.items()), at
