"""Runs at a constant rate: their schedule, and cool-downs that begin from one run's checkpoints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.run_state import refuse_another_run
from trainer.comm import Comm
from trainer.config import OptimConfig, RunConfig, parse_run
from trainer.engine.schedule import learning_rate_factor, warmup_cosine
from trainer.errors import CheckpointError, ConfigError

RUN = """
workdir: {workdir}
steps: 4
global_batch: 8
recipe:
  name: protoclip
  episode_samples: 16
  clusters: 4
  model:
    image_size: 16
    patch_size: 8
    text_length: 8
    vocabulary: 300
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    text: {{width: 32, layers: 1, heads: 2}}
    head: {{hidden: 24, dim: 8}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003, warmup_steps: 2, schedule: constant}}
evals: [{{name: zero_shot, label: names, data: "{spec}", target: name}}]
log_every: 1 steps
"""
NO_EVALS = "evals=[]"


def test_a_constant_rate_falls_in_its_last_steps_alone():
    for form, fall in (("linear", lambda p: 1 - p), ("one_minus_sqrt", lambda p: 1 - math.sqrt(p))):
        optim = OptimConfig(schedule="constant", warmup_steps=2, cooldown_steps=4, cooldown=form)
        factors = [learning_rate_factor(step, optim, total_steps=10) for step in range(10)]
        expected = [0.5, 1, 1, 1, 1, 1, *(fall(k / 4) for k in range(4))]
        assert factors == pytest.approx(expected, abs=1e-12)
        longer = [learning_rate_factor(step, optim, total_steps=20) for step in range(20)]
        assert longer[:7] == factors[:7]
        assert min(longer[:17]) == 0.5
        assert longer[-4:] == factors[-4:]
    plain = OptimConfig(warmup_steps=3)
    for step in range(9):
        cosine = warmup_cosine(step, warmup_steps=3, total_steps=9)
        assert learning_rate_factor(step, plain, total_steps=9) == cosine


def config_in(folder: Path, name: str, *overrides: str) -> RunConfig:
    spec = write_shards(folder / "shards", count=40, per_shard=20)
    return parse_run(RUN.format(workdir=folder / name, spec=spec), overrides)


def trained(comm: Comm, *configs: RunConfig) -> list[tuple[int, int, bool]]:
    from trainer.loop import train

    outcomes = [train(config) for config in configs]
    return [(each.progress.step, each.steps_now, each.finished) for each in outcomes]


def state_of(config: RunConfig) -> dict[str, torch.Tensor]:
    restored = Checkpointer(config.workdir / "checkpoints", Comm.solo()).latest()
    assert restored is not None
    groups = ("weights", "moments", "parts")
    return {f"{g}/{n}": value for g in groups for n, value in restored.tensors(g)}


def lines_of(config: RunConfig, name: str) -> list[dict]:
    found = [json.loads(line) for line in (config.workdir / name).read_text().splitlines()]
    clocks = ("timing", "seconds_extract", "seconds_cluster", "seconds_translate")
    return [{k: v for k, v in line.items() if k not in clocks} for line in found]


def test_cooldowns_from_one_run_are_the_runs_that_were_configured_so(tmp_path):
    """Bit for bit: weights, moments, episode tables, and every logged number."""
    branch = tmp_path / "trunk/checkpoints"
    short = ("steps=6", "optim.cooldown_steps=2")
    long = ("steps=9", "optim.cooldown_steps=3", "optim.cooldown=linear")
    trunk = [config_in(tmp_path, "trunk", NO_EVALS, f"steps={steps}") for steps in (4, 6)]
    branches = [
        config_in(tmp_path, "short", *short, f"begin_from={branch}/step-00000004"),
        config_in(tmp_path, "long", *long, f"begin_from={branch}/step-00000006"),
    ]
    whole = [config_in(tmp_path, f"whole-{n}", *each) for n, each in enumerate((short, long))]
    order = (trunk[0], branches[0], trunk[1], branches[1], *whole, branches[0])
    for outcome in run_ranks(trained, 2, *order, timeout_seconds=400):
        assert outcome == [
            *[(4, 4, True), (6, 2, True), (6, 2, True), (9, 3, True)],
            *[(6, 6, True), (9, 9, True), (6, 0, True)],
        ]
    for branched, direct, begun in zip(branches, whole, (4, 6), strict=True):
        expected, found = state_of(direct), state_of(branched)
        assert found.keys() == expected.keys()
        assert [n for n, value in expected.items() if not torch.equal(found[n], value)] == []
        for name in ("metrics.jsonl", "events.jsonl"):
            later = [line for line in lines_of(direct, name) if line["step"] > begun]
            assert [line for line in lines_of(branched, name) if line["step"] > begun] == later
        assert "names" in (branched.workdir / "events.jsonl").read_text()
    assert "names" not in (trunk[0].workdir / "events.jsonl").read_text()


def test_a_beginning_that_is_no_part_of_the_run_is_refused(tmp_path):
    trunk = config_in(tmp_path, "trunk", NO_EVALS, "steps=2")
    run_ranks(trained, 1, trunk, timeout_seconds=200)
    begin = f"begin_from={trunk.workdir}/checkpoints/step-00000002"
    for overrides, told in (
        (["optim.schedule=cosine"], "begin_from needs .* those of optim.schedule do"),
        (["average={}"], "average.final_momentum do; set it to"),
        (["recipe.locked_tail_episodes=1"], "set it to 0"),
        (["optim.cooldown_steps=9"], "are 11 together, and the run has 4 steps"),
    ):
        with pytest.raises(ConfigError, match=told):
            config_in(tmp_path, "branch", begin, *overrides)
    with pytest.raises(ConfigError, match="cooldown_steps is not read where schedule is cosine"):
        config_in(tmp_path, "other", "optim.schedule=cosine", "optim.cooldown_steps=2")
    wrong = [
        (["steps=2"], "at step 2, and the run ends at step 2; give more steps"),
        ([f"begin_from={tmp_path}/none"], "none is no sound checkpoint"),
        (["optim.learning_rate=0.1"], "step-00000002 is of another run .*learning_rate"),
        (["steps=3", "optim.cooldown_steps=1", "optim.weight_decay=0.1"], "weight_decay"),
    ]
    configs = [config_in(tmp_path, "branch", begin, *overrides) for overrides, _ in wrong]
    (found,) = run_ranks(refusals, 1, *configs, timeout_seconds=200)
    for told, (_, expected) in zip(found, wrong, strict=True):
        assert re.search(expected, told)


def refusals(comm: Comm, *configs: RunConfig) -> list[str]:
    found = []
    for config in configs:
        with pytest.raises(CheckpointError) as told:
            trained(comm, config)
        found.append(str(told.value))
    return found


def test_a_cooldown_changes_until_it_begins_and_not_behind_that(tmp_path):
    trunk = config_in(tmp_path, "trunk", "steps=8", "optim.cooldown_steps=4")
    other = config_in(tmp_path, "trunk", "steps=9", "optim.cooldown_steps=3")

    class At:
        folder = tmp_path

        def __init__(self, step: int) -> None:
            self.step = step

    refuse_another_run(trunk, other, At(4))
    with pytest.raises(CheckpointError, match=r"optim\.cooldown_steps: 4 -> 3"):
        refuse_another_run(trunk, other, At(5))
