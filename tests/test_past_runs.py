"""Checkpoints and run files that the program wrote before its rooms moved go on as they are.

`fixtures/past_runs.zip` was written by that program: two runs at step 4 of 6 and the numbers of all
six steps, and run files of others. Their shards are `write_shards(count=40, per_shard=20)`.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.checkpoint.run_state import refuse_another_run
from trainer.comm import Comm
from trainer.config import load_run, parse_run
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAST = Path(__file__).parent / "fixtures/past_runs.zip"
MODEL = """
  image_size: 16
  patch_size: 8
  embed_dim: 8
  image: {width: 16, layers: 1, heads: 2}
"""
TEXT = "  text_length: 8\n  text: {width: 16, layers: 1, heads: 2}\n"
RECIPES = {
    "clip-2": "name: clip",
    "siglip-1": "name: siglip",
    "given-1": "name: clip",
    "mlcd-2": "{name: mlcd, classes: [subgroup, concept], head: {sample_rate: 0.5}}",
    "pfc_ce-1": "{name: mlcd, loss: pfc_ce, classes: [concept], "
    "head: {sample_rate: 0.5, union_positives: true}}",
}
STAGES = {"clip-2": "zero3", "pfc_ce-1": "zero3"}


def short_run(name: str) -> str:
    """What the user had written for a run of the past: little."""
    recipe = yaml.safe_load(RECIPES[name])
    recipe["model"] = yaml.safe_load(MODEL)
    if recipe["name"] != "mlcd":
        words = {"tokenizer": "words"} if name == "given-1" else {"vocabulary": 270}
        recipe["model"] |= yaml.safe_load(TEXT) | words
    values = {
        "workdir": "run",
        "steps": 6,
        "global_batch": 8,
        "micro_batch": 4,
        "recipe": recipe,
        "data": {"train": "shards/emoji-{000000..000001}.tar"},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
        "log_every": "1 steps",
        "save_every": "4 steps",
    }
    return yaml.safe_dump(values)


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("past")
    with zipfile.ZipFile(PAST) as archive:
        archive.extractall(folder)  # our own file
    for name in STAGES:
        checkpoint = folder / name / "run/checkpoints/step-00000004"
        shutil.copy(checkpoint / "run.yaml", folder / name / "run.yaml")
        write_shards(folder / name / "shards", count=40, per_shard=20)
    return folder


def go_on_and_begin_anew(comm: Comm, folder: Path, stage: str) -> None:
    """From the old step 4, by the run file that the old program wrote; and once from nothing."""
    from trainer.loop import train

    os.chdir(folder)
    where = f"deepspeed={ROOT / 'ds_configs' / stage}.json"
    outcome = train(load_run("run.yaml", [where]))
    assert outcome.finished
    assert outcome.steps_now == 2
    assert train(load_run("run.yaml", [where, "workdir=anew"])).steps_now == 6


@pytest.mark.parametrize("name", STAGES)
def test_an_old_checkpoint_goes_on_to_the_numbers_of_both_programs(past, name):
    """Of the program that wrote it, and of today's from the first step on."""
    folder, ranks = past / name, int(name[-1])
    run_ranks(go_on_and_begin_anew, ranks, folder, STAGES[name], timeout_seconds=400)
    then = numbers(folder / "metrics.jsonl")
    assert list(then) == [1, 2, 3, 4, 5, 6]
    assert numbers(folder / "run/metrics.jsonl") == {s: approximately(then[s]) for s in (5, 6)}
    assert numbers(folder / "anew/metrics.jsonl") == {s: approximately(then[s]) for s in then}


def numbers(path: Path) -> dict[int, dict[str, float]]:
    """The loss and its terms, by step."""
    records = map(json.loads, path.read_text().splitlines())
    wanted = ("loss", "clip", "pfc_ce", "gradient_norm")
    return {r["step"]: {k: v for k, v in r["values"].items() if k in wanted} for r in records}


def approximately(values: dict[str, float]) -> object:
    """Equal bits on the processor that wrote them; another one may add in another order."""
    return pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_file_that_the_old_program_wrote_is_the_run_that_the_user_meant(past, name):
    """With every default written out, those too that are refused in a file of today."""
    written = (past / name / "run.yaml").read_text()
    refuse_another_run(parse_run(written), parse_run(short_run(name)))
    again = yaml.safe_load(written) | {"average": None}  # so it was written today
    if name == "mlcd-2" or name == "pfc_ce-1":
        parse_run(yaml.safe_dump(again))
    else:
        with pytest.raises(ConfigError, match="drop"):
            parse_run(yaml.safe_dump(again))


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("siglip-1", {"bias": False}, "siglip trains with a bias; drop `bias: false`"),
        ("given-1", {"vocabulary": 270}, "vocabulary is that of the tokenizer in words; drop it"),
        ("clip-2", {"logit_bias_init": -10.0}, "drop logit_bias_init"),
    ],
)
def test_in_a_file_of_a_user_the_same_keys_are_refused_with_what_to_do(name, keys, sentence):
    values = yaml.safe_load(short_run(name))
    values["recipe"]["model"] |= keys
    with pytest.raises(ConfigError, match=sentence):
        parse_run(yaml.safe_dump(values))
