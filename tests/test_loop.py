"""Whole runs: stop, go on, other ranks, another ZeRO stage; mistakes in one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run

STEPS = 8
TOWERS = ("image", "text", "other")

RUN = """
workdir: {folder}/run
steps: 8
global_batch: 12
micro_batch: 2
deepspeed: ds_configs/zero3.json
recipe:
  name: protoclip
  episode_samples: 36
  clusters: 5
  warm_start: true
  model:
    image_size: 32
    patch_size: 16
    text_length: 8
    vocabulary: 300
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    text: {{width: 32, layers: 1, heads: 2}}
    head: {{hidden: 24, dim: 8, norm: {norm}}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003, warmup_steps: 2}}
evals: [{{name: zero_shot, label: names, data: "{spec}", target: name, limit: 20}}]
log_every: 1 steps
save_every: 2 steps
"""


def config_in(folder: Path, *overrides: str, norm: str = "batch") -> RunConfig:
    spec = write_shards(folder / "shards", count=40, per_shard=20)
    return parse_run(RUN.format(folder=folder, spec=spec, norm=norm), overrides)


def run_once(comm: Comm, config: RunConfig, stop_after: int | None) -> dict:
    """Train in this rank; ask rank 0 to stop, by a real signal, once a checkpoint is there."""
    from trainer.loop import train

    if stop_after is not None and comm.is_main:
        threading.Thread(target=_signal_after, args=(config, stop_after), daemon=True).start()
    outcome = train(config)
    return {"step": outcome.progress.step, "finished": outcome.finished}


def _signal_after(config: RunConfig, step: int) -> None:
    metrics = config.workdir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGTERM)


def final_state(config: RunConfig) -> dict[str, torch.Tensor]:
    restored = Checkpointer(config.workdir / "checkpoints", Comm.solo()).latest()
    assert restored is not None
    assert restored.step == STEPS
    groups = ("weights", "moments", "parts")
    return {f"{g}/{n}": value for g in groups for n, value in restored.tensors(g)}


def logged(config: RunConfig, name: str) -> list[dict]:
    """Lines without what the clock says."""
    lines = [json.loads(line) for line in (config.workdir / name).read_text().splitlines()]
    clocks = ("timing", "seconds_extract", "seconds_cluster", "seconds_translate", "after_save")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> RunConfig:
    config = config_in(tmp_path_factory.mktemp("whole"))
    ranks = run_ranks(run_once, 2, config, None, timeout_seconds=300)
    assert ranks == [{"step": STEPS, "finished": True}] * 2
    return config


def test_a_run_leaves_what_it_was_started_from_and_all_that_it_printed(uninterrupted):
    """Every figure of the log stands beside the losses; nothing needs a checkpoint opened."""
    workdir = uninterrupted.workdir
    assert parse_run((workdir / "run.yaml").read_text()) == uninterrupted
    [start] = json.loads((workdir / "environment.json").read_text())
    assert start["step"] == 0
    assert start["ranks"] == 2
    assert start["packages"]["torch"] == torch.__version__
    assert len(start["hosts"]) == 1
    printed = (workdir / "log.txt").read_text()
    assert "2 ranks x 3 micro-batches of 2" in printed
    assert printed.count("  step 8/8  ") == 1
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"logit_scale", "prototype_scale", "learning_rate/image"} <= line["values"].keys()
    assert line["values"]["gradient_norm/text"] > 0
    whole = sum(line["values"][f"gradient_norm/{tower}"] ** 2 for tower in TOWERS) ** 0.5
    assert whole == pytest.approx(line["values"]["gradient_norm"], rel=1e-5)
    assert line["timing"]["tflops_per_device"] > 0
    assert line["timing"]["peak_gib"] > 0


def test_a_stopped_run_goes_on_to_the_same_bytes(uninterrupted, tmp_path):
    """Weights, moments, episode tables and every logged number; stopped within an episode."""
    config = config_in(tmp_path)
    stopped = run_ranks(run_once, 2, config, 4, timeout_seconds=300)
    assert not stopped[0]["finished"]
    assert 4 <= stopped[0]["step"] < STEPS
    run_ranks(run_once, 2, config, None, timeout_seconds=300)

    expected, actual = final_state(uninterrupted), final_state(config)
    assert actual.keys() == expected.keys()
    differing = [name for name, value in expected.items() if not torch.equal(actual[name], value)]
    assert differing == []
    assert logged(config, "metrics.jsonl") == logged(uninterrupted, "metrics.jsonl")
    assert [line["step"] for line in logged(config, "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert logged(config, "events.jsonl") == logged(uninterrupted, "events.jsonl")


def test_four_ranks_of_zero_3_go_on_as_three_of_zero_1(tmp_path):
    """The same steps as without the change, up to the order of sums."""
    for name in ("whole", "moved"):
        (tmp_path / name).mkdir()
    whole = config_in(tmp_path / "whole", "micro_batch=1", norm="layer")
    moved = config_in(tmp_path / "moved", "micro_batch=1", norm="layer")
    run_ranks(run_once, 4, whole, None, timeout_seconds=400)
    stopped = run_ranks(run_once, 4, moved, 4, timeout_seconds=400)
    assert not stopped[0]["finished"]
    other = moved.model_copy(update={"deepspeed": Path("ds_configs/zero1.json")})
    run_ranks(run_once, 3, other, None, timeout_seconds=400)

    expected, actual = final_state(whole), final_state(moved)
    for name in expected:
        if name.startswith("weights/"):
            torch.testing.assert_close(actual[name], expected[name], rtol=2e-4, atol=2e-5)
    steps = [line["step"] for line in logged(moved, "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))


def trainer_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_finished_run_says_so_and_a_changed_one_is_refused(uninterrupted, tmp_path):
    from trainer.config import dump_run

    path = tmp_path / "run.yaml"
    path.write_text(dump_run(uninterrupted))
    again = trainer_command(str(path))
    assert again.returncode == 0, again.stderr
    assert "nothing left to do" in again.stdout
    assert "nothing left to do" in (uninterrupted.workdir / "log.txt").read_text()

    changed = trainer_command(str(path), "steps=20", "optim.learning_rate=0.1")
    assert changed.returncode == 2
    assert "optim.learning_rate: 0.003 -> 0.1" in changed.stderr
    assert "Traceback" not in changed.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=/nowhere/{000..003}.tar"], "/nowhere"),
        (["global_batch=13"], "global_batch 13 is not divisible"),
        (["optim.learning_rat=1"], "learning_rat"),
        (["recipe.name=nope"], "no recipe is called 'nope'; known: aclip, clip"),
        (["recipe.clusters=100000"], "recipe.clusters 100000"),
        (["deepspeed=ds_configs/zero9.json"], "zero9.json"),
        (["steps"], "has no '='"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, overrides, message):
    spec = write_shards(tmp_path / "shards", count=40, per_shard=20)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, spec=spec, norm="layer"))
    result = trainer_command(str(path), *overrides)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(line) < 500


def hold_and_train(comm: Comm, config: RunConfig) -> str:
    """Try to train in a workdir that another run of this process holds."""
    from trainer.checkpoint.lock import sole_user
    from trainer.errors import ConfigError
    from trainer.loop import train

    with sole_user(config.workdir, comm):
        try:
            train(config)
        except ConfigError as error:
            return str(error)
    return "trained"


def test_a_second_run_in_the_same_workdir_is_refused_on_all_ranks(tmp_path):
    messages = run_ranks(hold_and_train, 2, config_in(tmp_path), timeout_seconds=100)
    assert messages[0] == messages[1]
    assert "another run is using" in messages[0]
