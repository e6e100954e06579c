"""A-CLIP as a run: a plain loop, CLIP to the bit, any ranks and stage, and going on at another."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import AverageConfig, RunConfig, dump_run, parse_run
from trainer.engine.groups import parameter_groups
from trainer.engine.schedule import warmup_cosine
from trainer.errors import ConfigError
from trainer.models.token_selection import patches_of, projected_scores
from trainer.parts.averaged_weights import momentum_at
from trainer.recipe import build_model, load_recipe
from trainer.run import context_of, stream_of, tokenizer_of
from trainer.types import Batch

STEPS = 3
TOWER = {"width": 32, "layers": 2, "heads": 2}
MODEL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "text_length": 8,
    "vocabulary": 300,
    "embed_dim": 16,
    "image": TOWER,
    "text": {**TOWER, "layers": 1},
}
HEADS = {"head": {"hidden": 24, "dim": 8}}
DEEPER = {"head": {"hidden": 24, "dim": 8, "layers": 2}}
ACLIP = {"name": "aclip", "simclr": DEEPER, "byol": HEADS}
RECIPES: dict[str, dict[str, Any]] = {
    "aclip": {**ACLIP, "momentum_copy": {"momentum": 0.8, "final_momentum": 0.9}},
    "half": {**ACLIP, "tokens": {"cover_scale": 0.5}},
    "nothing": {
        "name": "aclip",
        "views": 1,
        "simclr": None,
        "byol": None,
        "frozen_patches": False,
        "tokens": {"keep": 1.0},
    },
    "clip": {"name": "clip"},
    "siglip": {"name": "siglip", "tokens": {"select": "inverse"}},
    "protoclip": {
        "name": "protoclip",
        "episode_samples": 16,
        "clusters": 4,
        "warmup_episodes": 1,
        "tokens": {"select": "random", "keep": 0.25},
    },
    "mlcd": {"name": "mlcd", "classes": ["subgroup"], "tokens": {}},
}


def config_in(folder: Path, name: str, **changes: Any) -> RunConfig:
    """A run called `<recipe>-<ranks>-<stage>`, and perhaps `-again`."""
    recipe, _, stage, *_ = name.split("-")
    spec = str(folder / "shards" / "emoji-{000000..000001}.tar")
    if not (folder / "shards").exists():
        assert write_shards(folder / "shards", count=40, per_shard=20) == spec
    model = MODEL if recipe != "mlcd" else {k: MODEL[k] for k in MODEL if k not in TEXTS}
    if recipe == "protoclip":  # a batch norm would depend on the micro-batch
        model = {**MODEL, "head": {"hidden": 16, "dim": 8, "norm": "layer"}}
    # What decides about momentum and rounding decides about Adam's first steps too: a key's bias
    # has no gradient but rounding.
    values = {
        "workdir": str(folder / name),
        "steps": STEPS,
        "global_batch": 8,
        "micro_batch": 4,
        "deepspeed": f"ds_configs/{stage}.json",
        "recipe": {**RECIPES[recipe], "model": model},
        "data": {"train": spec, "augment": {"solarize_probability": 0.3}},
        "optim": {"learning_rate": 0.003, "warmup_steps": 1, "epsilon": 1e-3},
        "log_every": "1 steps",
        "save_every": "1 steps",
        "keep_checkpoints": 9,
        **changes,
    }
    if recipe in WHOLE:
        values["micro_batch"] = None
    return parse_run(json.dumps(values))


TEXTS = ("text_length", "vocabulary", "text")
WHOLE = ("aclip", "half")
"""Batch norms take their statistics of a micro-batch."""


def train_each(comm: Comm, cases: list[tuple[RunConfig, RunConfig | None]]) -> None:
    """Train each; where there is another run, go on from what it had saved at step 2."""
    from trainer.loop import train

    for config, other in cases:
        if other is not None and comm.is_main:
            saved = "checkpoints/step-00000002"
            shutil.copytree(other.workdir / saved, config.workdir / saved)
            if (other.workdir / "tokenizer").exists():
                shutil.copytree(other.workdir / "tokenizer", config.workdir / "tokenizer")
        comm.barrier()
        assert train(config).finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aclip")


def ran(folder: Path, ranks: int, *names: str | tuple[str, str]) -> None:
    """Runs in one launch; of a pair, the first goes on from the second."""
    cases = [name if isinstance(name, tuple) else (name, None) for name in names]
    configs = [
        (config_in(folder, one), None if other is None else config_in(folder, other))
        for one, other in cases
        if not (folder / one / "checkpoints" / f"step-{STEPS:08d}").exists()
    ]
    if configs:
        run_ranks(train_each, ranks, configs, timeout_seconds=500)


def tensors(folder: Path, name: str, group: str, step: int = STEPS) -> dict[str, Tensor]:
    found = (folder / name / f"checkpoints/step-{step:08d}").glob(f"{group}-*.safetensors")
    return {key: value for path in found for key, value in load_file(path).items()}


def logged(folder: Path, name: str) -> list[dict[str, float]]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["values"] for line in lines]


AGAIN = ("aclip-1-zero3-again", "aclip-1-zero3")
ALONE = ("aclip-1-zero3", AGAIN, "nothing-1-zero3", "clip-1-zero3")
ELSEWHERE = ("aclip-2-zero3-again", "aclip-1-zero3")
TWICE = ("aclip-2-zero2-again", "aclip-2-zero2")
TOGETHER = ("aclip-2-zero0", "aclip-2-zero2", TWICE, "half-2-zero3", ELSEWHERE)


def test_the_steps_are_those_of_a_plain_loop(folder: Path) -> None:
    """ZeRO-3 with checkpointing against torch alone: whole maps of attention, a copied module as
    the momentum copy, views one after another, losses in float64, torch's AdamW."""
    ran(folder, 1, *ALONE)
    config = config_in(folder, "aclip-1-zero3")
    wanted, weights, averages = plain_loop(config)
    for found, terms in zip(logged(folder, "aclip-1-zero3"), wanted, strict=True):
        for term, value in terms.items():
            assert found[term] == pytest.approx(value, rel=2e-4), term
    close(tensors(folder, "aclip-1-zero3", "weights"), weights)
    parts = tensors(folder, "aclip-1-zero3", "parts")
    close({name.removeprefix("tokens/"): value for name, value in parts.items()}, averages)
    moved = [float((parts[f"tokens/{n}"] - weights[n]).abs().max()) for n in averages]
    assert max(moved) > 1e-3, "the copy lags behind"


def plain_loop(
    config: RunConfig,
) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    tokenizer = tokenizer_of(config, Comm.solo())
    model: Any = build_model(config.recipe, tokenizer, Comm.solo(), seed=config.seed)
    average = copy.deepcopy(model)
    stream = stream_of(config, Comm.solo(), tokenizer, micro_batch=8)
    optim = config.optim
    groups = parameter_groups(model.named_parameters(), optim, model.parameter_depth)
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.epsilon)
    logs = []
    for step in range(STEPS):
        (batch,) = stream.take()
        terms = plain_losses(model, average, batch)
        total = terms["clip"] + terms["simclr"] + 2 * terms["byol"]
        logs.append({n: float(value.detach()) for n, value in {**terms, "loss": total}.items()})
        total.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * warmup_cosine(step, warmup_steps=1, total_steps=STEPS)
        optimizer.step()
        optimizer.zero_grad()
        momentum = 0.9 - 0.1 * (math.cos(math.pi * step / STEPS) + 1) / 2
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.data.mul_(momentum).add_(new.detach(), alpha=1 - momentum)
    stream.close()
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return logs, named, {n: p.detach() for n, p in average.named_parameters() if n in named}


def plain_losses(model: Any, average: Any, batch: Batch) -> dict[str, Tensor]:
    assert batch.images is not None
    assert batch.views is not None
    target, kept = plain_scores(average, batch)
    views = [batch.images, batch.views[:, 0]]
    pooled = [plain_pooled(model, view, kept[:, i]) for i, view in enumerate(views)]
    text = normalize(model.text.texts(batch.tokens, batch.token_mask), dim=1).double()
    scale = model.logit_scale().double()
    own = torch.arange(8)
    clip = []
    for rows in pooled:
        logits = scale * normalize(model.image.projection(rows), dim=1).double() @ text.T
        clip.append((cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2)
    both = torch.cat(pooled)
    found = normalize(model.simclr_head(both), dim=1).double()
    cosines = (found @ found.T / 0.1).masked_fill(torch.eye(16, dtype=torch.bool), -torch.inf)
    predicted = normalize(model.byol_predictor(model.byol_projector(both)), dim=1).double()
    distance = (predicted - target.repeat(2, 1)).square().sum(1)
    return {
        "clip": (clip[0] + clip[1]) / 2,
        "simclr": cross_entropy(cosines, torch.cat([own + 8, own])),
        "byol": distance.mean(),
    }


@torch.no_grad()
def plain_scores(average: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The copy's projection, and 8 of 16 squares of each view, by whole maps of attention."""
    backbone = copy.deepcopy(average.image.backbone)
    backbone.set_attn_implementation("eager")
    output = backbone(pixel_values=batch.cover, output_attentions=True)
    target = normalize(average.byol_projector(output.pooler_output), dim=1).double()
    rows = torch.stack([layer[:, :, 0, 1:] for layer in output.attentions]).mean((0, 2))
    assert batch.boxes is not None
    maps = projected_scores(rows, batch.boxes, side=8).view(8, 2, 8, 8)
    squares = maps.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).flatten(2)
    return target, patches_of(squares.topk(8).indices, side=8, group=2)


def plain_pooled(model: Any, view: Tensor, kept: Tensor) -> Tensor:
    backbone = model.image.backbone
    states = backbone.embeddings(view)
    rows = [torch.cat([row[:1], row[1:][ids]]) for row, ids in zip(states, kept, strict=True)]
    hidden = backbone.pre_layrnorm(torch.stack(rows))
    states = backbone.encoder(inputs_embeds=hidden).last_hidden_state
    pooled: Tensor = backbone.post_layernorm(states[:, 0])
    return pooled


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 2e-5) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=atol, msg=name)


def test_one_view_of_all_patches_without_further_terms_is_clip_to_the_bit(folder: Path) -> None:
    ran(folder, 1, *ALONE)
    assert logged(folder, "nothing-1-zero3") == logged(folder, "clip-1-zero3")
    ours, clip = (tensors(folder, f"{n}-1-zero3", "weights") for n in ("nothing", "clip"))
    assert ours.keys() == clip.keys()
    assert all(torch.equal(ours[name], clip[name]) for name in clip)


def test_a_run_goes_on_from_its_middle_to_the_same_bytes(folder: Path) -> None:
    """The copy's share that a rank holds too."""
    ran(folder, 1, *ALONE)
    ran(folder, 2, *TOGETHER)
    for run in ("aclip-1-zero3", "aclip-2-zero2"):
        for group in ("weights", "moments", "parts"):
            whole, again = (tensors(folder, f"{run}{end}", group) for end in ("", "-again"))
            assert whole.keys() == again.keys()
            assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert logged(folder, run)[2:] == logged(folder, f"{run}-again")


def same_run(folder: Path, name: str, other: str) -> None:
    for found, wanted in zip(logged(folder, name)[::-1], logged(folder, other)[::-1], strict=False):
        for term in ("clip", "simclr", "byol", "gradient_norm"):
            assert found[term] == pytest.approx(wanted[term], rel=1e-4), (name, term)
    for group in ("weights", "parts"):
        close(tensors(folder, name, group), tensors(folder, other, group))


def test_two_ranks_under_any_stage_take_the_steps_of_one(folder: Path) -> None:
    """One of them goes on, under ZeRO-3 on two ranks, from what one rank had saved."""
    ran(folder, 1, *ALONE)
    ran(folder, 2, *TOGETHER)
    for name in ("aclip-2-zero0", "aclip-2-zero2", "aclip-2-zero3-again"):
        same_run(folder, name, "aclip-1-zero3")
    assert all(math.isfinite(line["loss"]) for line in logged(folder, "half-2-zero3"))


@pytest.mark.slow
def test_four_ranks_too(folder: Path) -> None:
    ran(folder, 1, *ALONE, "half-1-zero3")
    ran(folder, 2, *TOGETHER)
    ran(folder, 4, "aclip-4-zero0", "aclip-4-zero3", ("aclip-4-zero2-again", "aclip-1-zero3"))
    for name in ("aclip-4-zero0", "aclip-4-zero3", "aclip-4-zero2-again"):
        same_run(folder, name, "aclip-1-zero3")
    same_run(folder, "half-2-zero3", "half-1-zero3")


def test_other_recipes_take_it_by_a_key(folder: Path) -> None:
    """In micro-batches on two ranks, and whole on one; protoclip's episode reads all patches."""
    names = ("siglip", "protoclip", "mlcd")
    ran(folder, 2, *(f"{name}-2-zero3" for name in names))
    ran(folder, 1, *((f"{name}-1-zero2-again", f"{name}-2-zero3") for name in names))
    for name in names:
        ends = ("1-zero2-again", "2-zero3")
        close(*(tensors(folder, f"{name}-{end}", "weights") for end in ends))
        found = tensors(folder, f"{name}-2-zero3", "parts")
        copied = any(key.startswith("tokens/image.backbone") for key in found)
        assert copied == (name != "protoclip"), "a draw asks no copy"


def built(folder: Path, **recipe: Any) -> Any:
    config = config_in(folder, "aclip-1-zero0", recipe={"model": MODEL, **recipe})
    tokenizer = tokenizer_of(config, Comm.solo())
    return load_recipe(config.recipe, context_of(config, Comm.solo(), tokenizer))


CLIP = {"name": "clip"}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"name": "aclip", "views": 1}, "simclr compares views .* set views=2, or simclr=null"),
    ({"name": "aclip", "parity": "code", "views": 3}, "for two views, not 3"),
    ({**CLIP, "tokens": {"select": "none", "keep": 0.4}}, "keep is not read where select is none"),
    ({**CLIP, "tokens": {"select": "random", "cover_scale": 0.5}}, "cover_scale is not read"),
    ({**CLIP, "tokens": {"keep": 0}}, "keep"),
    ({**CLIP, "momentum_copy": {"momentum": 0.5}}, "momentum_copy is not read where no scores"),
    ({**CLIP, "tokens": {"group": 3}}, "group is 3, which does not divide the 8 .* 1 or 2 or 4"),
    ({**CLIP, "tokens": {"group": 8}}, "keep=0.5 of 1 squares of 8 x 8 patches is all of them"),
    ({**CLIP, "tokens": {"keep": 0.99, "rounding": "floor_plus_one"}}, "nothing would be left out"),
    ({**CLIP, "tokens": {"cover_scale": 0.45}}, "cover_scale.*14 pixels .* of 4; use 12"),
]


@pytest.mark.parametrize(("recipe", "said"), MISTAKES)
def test_mistakes_are_told_in_a_sentence(folder: Path, recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        built(folder, **recipe)


def test_what_the_published_code_does_otherwise_is_one_key(folder: Path) -> None:
    runs = [
        config_in(folder, "aclip-1-zero0", recipe={**ACLIP, "model": MODEL, "parity": parity})
        for parity in ("paper", "code")
    ]
    paper, code = (run.recipe for run in runs)
    assert (paper.tokens.rounding, code.tokens.rounding) == ("floor", "floor_plus_one")
    assert [c.wanted_views().geometry for c in (paper, code)] == ["covering", "as_published"]
    assert [parse_run(dump_run(run)).recipe for run in runs] == [paper, code]


def test_simclr_of_a_view_and_itself_is_far_below_chance_and_of_two_views_is_not(
    folder: Path,
) -> None:
    """What a recipe that gives the first view twice would show from its first step."""
    ran(folder, 1, *ALONE)
    first = logged(folder, "aclip-1-zero3")[0]
    assert first["simclr"] > 0.6 * math.log(15)
    config = config_in(folder, "aclip-1-zero0", recipe={**ACLIP, "model": MODEL, "parity": "code"})
    tokenizer = tokenizer_of(config, Comm.solo())
    recipe: Any = load_recipe(config.recipe, context_of(config, Comm.solo(), tokenizer))
    (batch,) = stream_of(config, Comm.solo(), tokenizer, micro_batch=8).take()
    assert not torch.equal(batch.images, batch.views[:, 0])
    batch = batch._replace(more={"byol_target": normalize(torch.ones(8, 8), dim=1)})
    losses = recipe.losses(recipe.model(batch), batch, 0).detach()
    assert float(losses["simclr"]) < 0.6 * first["simclr"]


def test_the_published_schedule_and_average() -> None:
    path = Path(__file__).parent.parent / "golden" / "aclip" / "ema_and_schedules.npz"
    with np.load(path, allow_pickle=False) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
    base, schedule = float(golden["momentum_base"]), golden["momentum_schedule"].tolist()
    config = AverageConfig(momentum=base)
    ours = [momentum_at(step, len(schedule), config) for step in range(len(schedule))]
    assert ours == pytest.approx(schedule, rel=1e-12)
    average = golden["ema_before"].clone()
    for momentum, wanted in zip(golden["momentum_sequence"], golden["ema_after"], strict=True):
        average.lerp_(golden["online"], 1 - float(momentum))
        torch.testing.assert_close(average, wanted, rtol=1e-12, atol=1e-12)


def test_an_evaluation_reads_all_patches(folder: Path) -> None:
    ran(folder, 1, *ALONE)
    config = config_in(folder, "aclip-1-zero3")
    tokenizer = tokenizer_of(config, Comm.solo())
    model: Any = build_model(config.recipe, tokenizer, Comm.solo(), seed=0).eval()
    (batch,) = stream_of(config, Comm.solo(), tokenizer, micro_batch=8).take()
    said = model(batch)
    assert said.more is None
    torch.testing.assert_close(said.image, normalize(model.image.images(batch.images), dim=1))
