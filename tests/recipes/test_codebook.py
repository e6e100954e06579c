"""The captioner of codes: what its loss is, and that ranks, micro-batches and resuming keep it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.fixtures.emoji import write_shards
from tests.models.small import LENGTH, small_batch, word_tokenizer
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import parse_run
from trainer.errors import ConfigError
from trainer.models.code_tower import CodeTower
from trainer.recipe import Context
from trainer.recipes.codebook import Config, Recipe, build_model

SECTION = {
    "name": "codebook",
    "model": {
        "image_size": 32,
        "patch_size": 16,
        "embed_dim": 8,
        "image": {"width": 32, "layers": 1, "heads": 2},
    },
    "captions": {"length": LENGTH, "vocabulary": 300},
    "codes": {"count": 12},
    "decoder": {"width": 16, "layers": 1, "heads": 2},
}


def config_of(**changes: object) -> Config:
    return Config.model_validate({**SECTION, **changes})


def model_of(config: Config) -> CodeTower:
    return build_model(config, word_tokenizer(), seed=1)


def recipe_of(config: Config) -> Recipe:
    context = Context(Comm.solo(), word_tokenizer(), 1, 4, 10, Path("nowhere"), None)
    return Recipe(config, context)


@torch.no_grad()
def test_a_caption_costs_what_its_tokens_cost_one_after_the_other():
    """Each token by a decoder that was given only what stands before it."""
    model, batch = model_of(config_of()).double().eval(), small_batch()
    batch = batch._replace(images=batch.images.double())
    features = model(batch)
    rows = nn.functional.normalize(model.image.codebook.rows, dim=1)
    states = model.bridge(rows[features.tensor("codes")])
    for n in range(4):
        cost, length = 0.0, int(batch.token_mask[n].sum())
        for place in range(1, length):
            before = batch.tokens[n : n + 1, :place]
            said = model.decoder(
                input_ids=before, encoder_hidden_states=states[n : n + 1], use_cache=False
            )
            cost -= float(said.logits[0, -1].log_softmax(dim=0)[batch.tokens[n, place]])
        # straight through, a code is z + (e - z), which float32 would round
        assert features.tensor("nats")[n].item() == pytest.approx(cost, rel=1e-5)


@torch.no_grad()
def test_the_embedding_is_the_mean_of_the_codes_that_are_nearest():
    model, batch = model_of(config_of()).eval(), small_batch()
    features = model(batch._replace(tokens=None, token_mask=None))
    patches = model.image.backbone(pixel_values=batch.images).last_hidden_state[:, 1:]
    z = nn.functional.normalize(model.image.projection(patches), dim=2)
    rows = nn.functional.normalize(model.image.codebook.rows, dim=1)
    nearest = (z @ rows.T).argmax(dim=2)  # the largest cosine, where distances were compared
    assert features.tensor("codes").tolist() == nearest.tolist()
    mean = nn.functional.normalize(rows[nearest].mean(dim=1), dim=1)
    torch.testing.assert_close(features.image, mean)
    torch.testing.assert_close(
        nn.functional.normalize(model.image.images(batch.images), dim=1), mean
    )
    assert "nats" not in features.tensors()


def test_every_key_changes_the_loss_or_the_model():
    batch = small_batch()
    plain = config_of()
    first = {n: p.shape for n, p in model_of(plain).named_parameters()}

    def total(**changes: object) -> float:
        recipe = recipe_of(config_of(**changes))
        return recipe.losses(recipe.model(batch), batch, 1).total.item()

    for changes in (
        {"commitment_weight": 2.0},
        {"codebook_weight": 0.25},
        {"untold_weight": 0.5},
        {"codes": {"count": 12, "unit": False}},
        {"codes": {"count": 12, "temperature": 0.5}},
    ):
        assert total(**changes) != pytest.approx(total(), rel=1e-6), changes
    for changes in (
        {"codes": {"count": 13}},
        {"decoder": {"width": 24, "layers": 1, "heads": 2}},
        {"decoder": {"width": 16, "layers": 2, "heads": 2}},
        {"captions": {"length": LENGTH + 1, "vocabulary": 300}},
    ):
        shapes = {n: p.shape for n, p in model_of(config_of(**changes)).named_parameters()}
        assert shapes != first, changes
    heads = model_of(config_of(decoder={"width": 16, "layers": 1, "heads": 4}))
    assert not torch.equal(heads(batch).tensor("nats"), model_of(plain)(batch).tensor("nats"))


def test_a_temperature_that_nothing_reads_and_divided_heads_are_refused():
    with pytest.raises(ValidationError, match="not divisible by 3 heads"):
        config_of(decoder={"width": 16, "heads": 3})
    with pytest.raises(ValidationError, match="temperature"):
        config_of(untold_weight=0.0, codes={"count": 12, "temperature": 0.5})
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        build_model(config_of(), None)


RUN = """
workdir: {folder}/{name}
steps: 4
global_batch: 8
micro_batch: {micro}
deepspeed: ds_configs/{zero}.json
recipe: {recipe}
data: {{train: "{spec}", workers: 0}}
optim: {{learning_rate: 0.003}}
save_every: 2 steps
log_every: 1 steps
"""


def trained(comm: Comm, text: str) -> list[dict[str, float]]:
    from trainer.loop import train

    config = parse_run(text, ["optim.warmup_steps=0"])
    train(config)
    comm.barrier()
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    names = ("caption", "commitment", "codebook", "untold", "codes_used")
    return [{n: json.loads(line)["values"][n] for n in names} for line in lines]


def from_the_middle(comm: Comm, text: str) -> list[dict[str, float]]:
    """Go on from the checkpoint of step 2, after the one of step 4 is lost."""
    trained(comm, text)
    checkpoints = parse_run(text).workdir / "checkpoints"
    shutil.rmtree(max(checkpoints.glob("step-*")))
    return trained(comm, text)


@pytest.mark.heavy
def test_ranks_micro_batches_zero_3_and_resuming_take_the_same_steps(tmp_path):
    """And captions of ranks with unequally many tokens weigh as in one batch."""
    spec = write_shards(tmp_path / "shards", count=16, per_shard=8)

    def run(name: str, micro: int, zero: str) -> str:
        said = {"name": name, "micro": micro, "zero": zero, "recipe": json.dumps(SECTION)}
        return RUN.format(folder=tmp_path, spec=spec, **said)

    one = run_ranks(trained, 1, run("one", 8, "zero0"))[0]
    two = run_ranks(trained, 2, run("two", 2, "zero3"))[0]
    again = run_ranks(from_the_middle, 1, run("again", 8, "zero0"))[0]
    assert len({line["caption"] for line in one}) == 4
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=2e-4)
    assert again == one
