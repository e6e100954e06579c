"""`average:` in a run file: the formula, what evaluations read, and going on from a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.errors import ConfigError
from trainer.evals import evaluate_all
from trainer.programs.workdir import encoder, evaluate_workdir, open_workdir
from trainer.recipe import build_model
from trainer.run import eval_context, tokenizer_of

STEPS, START, END = 4, 0.6, 0.9

RUN = """
workdir: {folder}/{name}
steps: 4
global_batch: 8
micro_batch: 4
deepspeed: ds_configs/{stage}.json
recipe:
  name: clip
  model:
    image_size: 32
    patch_size: 16
    text_length: 8
    vocabulary: 300
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    text: {{width: 32, layers: 1, heads: 2}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.01, warmup_steps: 1}}
average: {{momentum: 0.6, final_momentum: 0.9}}
evals:
  - {{name: retrieval, label: averaged, data: "{spec}", limit: 20, weights: averaged}}
  - {{name: retrieval, label: trained, data: "{spec}", limit: 20}}
log_every: 1 steps
save_every: 1 steps
keep_checkpoints: 9
"""


def config_in(folder: Path, name: str, *overrides: str) -> RunConfig:
    stage = name.split("-")[1] if "-" in name else "zero0"
    shards = folder / "shards"
    spec = str(shards / "emoji-{000000..000001}.tar")
    if not shards.exists():
        assert write_shards(shards, count=40, per_shard=20) == spec
    return parse_run(RUN.format(folder=folder, name=name, stage=stage, spec=spec), overrides)


def train_each(comm: Comm, cases: list[tuple[RunConfig, RunConfig | None]]) -> None:
    """Train each; where there is another run, go on from what it had saved at step 2."""
    from trainer.loop import train

    for config, other in cases:
        if other is not None and comm.is_main:
            saved = "checkpoints/step-00000002"
            shutil.copytree(other.workdir / saved, config.workdir / saved)
            shutil.copytree(other.workdir / "tokenizer", config.workdir / "tokenizer")
        comm.barrier()
        assert train(config).finished


def group_of(config: RunConfig, group: str, step: int) -> dict[str, Tensor]:
    """A group of tensors of the checkpoint of a step, of all ranks, as the files have it."""
    folder = config.workdir / f"checkpoints/step-{step:08d}"
    return {n: v for p in folder.glob(f"{group}-*.safetensors") for n, v in load_file(p).items()}


def averages_of(config: RunConfig, step: int = STEPS) -> dict[str, Tensor]:
    parts = group_of(config, "parts", step)
    assert all(name.startswith("average/") for name in parts)
    return {name.removeprefix("average/"): value for name, value in parts.items()}


def naive_average(config: RunConfig) -> dict[str, Tensor]:
    """a <- m a + (1 - m) w of whole weights in float32, from those before the first step, over
    saved ones.

    m goes from 0.6 to 0.9 by half a cosine.
    """
    model = build_model(
        config.recipe, tokenizer_of(config, Comm.solo()), Comm.solo(), seed=config.seed
    )
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(STEPS):
        momentum = END - (END - START) * (math.cos(math.pi * step / STEPS) + 1) / 2
        for name, weight in group_of(config, "weights", step + 1).items():
            average[name].lerp_(weight, 1 - momentum)
    return average


def figures_logged(config: RunConfig) -> dict[str, dict[str, float]]:
    """The last line of each evaluation, without what says where the run was."""
    lines = (config.workdir / "events.jsonl").read_text().splitlines()
    found = {record["event"]: record for record in map(json.loads, lines)}
    kept = {label: found[label] for label in ("averaged", "trained")}
    return {k: {n: v for n, v in one.items() if n != "timing"} for k, one in kept.items()}


def ending_at(folder: Path, momentum: int) -> RunConfig:
    average = f"average={{momentum: {momentum}, final_momentum: {momentum}}}"
    return config_in(folder, f"1-zero2-m{momentum}", average, "evals=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs called `<ranks>-<stage>`; `-again` are those that went on from step 2 of another."""
    folder = tmp_path_factory.mktemp("averaged")

    def case(name: str, other: str | None = None) -> tuple[RunConfig, RunConfig | None]:
        return config_in(folder, name), None if other is None else config_in(folder, other)

    two = [case("2-zero0"), case("2-zero2"), case("2-zero3")]
    two += [case("2-zero2-again", "2-zero2"), case("2-zero3-again", "2-zero3")]
    run_ranks(train_each, 2, two, timeout_seconds=400)
    one = [case("1-zero3"), case("1-zero0-again", "2-zero3")]
    one += [(ending_at(folder, momentum), None) for momentum in (0, 1)]
    run_ranks(train_each, 1, one, timeout_seconds=400)
    return folder


@pytest.mark.parametrize("name", ["1-zero3", "2-zero0", "2-zero2", "2-zero3"])
def test_the_average_in_the_checkpoint_is_a_plain_loop_over_the_weights(folder, name):
    config = config_in(folder, name)
    naive, weights, found = naive_average(config), group_of(config, "weights", STEPS), {}
    found = averages_of(config)
    assert found.keys() == naive.keys() == weights.keys()
    for key, value in naive.items():
        assert torch.equal(found[key], value), key
    assert any((found[key] - weights[key]).abs().max() > 1e-3 for key in found)


@pytest.mark.slow
def test_the_average_over_the_shards_of_four_ranks_is_that_of_whole_weights_too(folder):
    """Under every stage, with checkpointing; and of four that go on from what two had saved."""
    more = ("micro_batch=2", "evals=[]", "gradient_checkpointing=true")
    stages = ("zero0", "zero2", "zero3")
    runs = [config_in(folder, f"4-{stage}", *more) for stage in stages]
    moved = config_in(folder, "4-zero2-again", *more), config_in(folder, "2-zero3")
    run_ranks(train_each, 4, [*((run, None) for run in runs), moved], timeout_seconds=600)
    for config in runs:
        naive, found = naive_average(config), averages_of(config)
        assert found.keys() == naive.keys()
        assert all(torch.equal(found[key], value) for key, value in naive.items())
    expected, found = averages_of(moved[1]), averages_of(moved[0])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_an_average_that_keeps_everything_stays_and_one_that_keeps_nothing_is_the_weights(folder):
    follows, stays = (ending_at(folder, momentum) for momentum in (0, 1))
    weights = group_of(follows, "weights", STEPS)
    assert all(torch.equal(value, weights[key]) for key, value in averages_of(follows).items())
    tokenizer = tokenizer_of(stays, Comm.solo())
    start = build_model(stays.recipe, tokenizer, Comm.solo(), seed=stays.seed).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in averages_of(stays).items())
    moved = group_of(stays, "weights", STEPS)
    assert any(not torch.equal(value, start[key]) for key, value in moved.items())


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_with_an_average_goes_on_to_the_same_bytes(folder, stage):
    whole, again = (config_in(folder, f"2-{stage}{end}") for end in ("", "-again"))
    for group in ("weights", "moments", "parts"):
        expected, found = (group_of(config, group, STEPS) for config in (whole, again))
        assert found.keys() == expected.keys()
        assert [k for k, value in expected.items() if not torch.equal(found[k], value)] == []
    assert figures_logged(again) == figures_logged(whole)


def test_the_average_of_two_ranks_goes_on_on_one_under_another_stage(folder):
    expected, found = (averages_of(config_in(folder, n)) for n in ("2-zero3", "1-zero0-again"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["1-zero3", "2-zero2", "2-zero3"])
def test_evaluations_of_averaged_weights_are_those_of_a_model_with_them(folder, name):
    """What training logged, what the tool finds, and a model that got the naive average by hand."""
    config = config_in(folder, name)
    tokenizer = tokenizer_of(config, Comm.solo())
    model = build_model(config.recipe, tokenizer, Comm.solo(), seed=config.seed)
    model.load_state_dict(naive_average(config), strict=False)
    context = eval_context(config, Comm.solo(), tokenizer)
    by_hand = evaluate_all(config.evals, encoder(model.eval()), context)["averaged"]
    logged, tool = figures_logged(config), evaluate_workdir(config.workdir, Comm.solo())
    for label in ("averaged", "trained"):
        assert tool[label].items() <= numbers(logged[label]).items()
    assert by_hand == tool["averaged"]
    assert tool["averaged"] != tool["trained"], "else this shows nothing"
    asked = evaluate_workdir(config.workdir, Comm.solo(), weights="trained")
    assert asked == {"averaged": tool["trained"], "trained": tool["trained"]}


def numbers(record: dict[str, float]) -> dict[str, float]:
    """A logged line as the tool names it."""
    return {"samples" if k == "num_samples" else k: v for k, v in record.items()}


def test_a_workdir_is_opened_with_its_averaged_weights(folder):
    config = config_in(folder, "2-zero3")
    model = open_workdir(config.workdir, Comm.solo(), weights="averaged").model
    averages = averages_of(config)
    for key, value in model.named_parameters():
        assert torch.equal(value, averages[key])


def test_averaged_weights_of_a_run_without_an_average_are_refused_in_a_sentence(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"averaged is of averaged weights, .* `average: \{\}`"):
        config_in(folder, "2-zero3", "average=null")
    plain = config_in(folder, "plain", "average=null", "evals=[]")
    run_ranks(train_each, 1, [(plain, None)], timeout_seconds=400)
    with pytest.raises(ConfigError, match="plain kept no average of its weights; train with"):
        open_workdir(plain.workdir, Comm.solo(), weights="averaged")
