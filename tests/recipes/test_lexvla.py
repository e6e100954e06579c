"""LexVLA: whose words, which vectors, what learns, and the same run on any ranks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from tests.fixtures.emoji import read_pairs, write_shards
from tests.models import folders
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.prompted import with_template
from trainer.data.tokenize import load_tokenizer, save_tokenizer, token_ids, train_tokenizer
from trainer.errors import ConfigError
from trainer.export.transformers_folder import export_model
from trainer.models.words import chosen_words, output_rows
from trainer.programs.workdir import evaluate_workdir, logged_results
from trainer.recipe import load_recipe
from trainer.run import context_of, stream_of, tokenizer_of
from trainer.types import Batch

RUN = """
workdir: {folder}/run
steps: 4
global_batch: 8
micro_batch: 2
deepspeed: ds_configs/zero3.json
gradient_checkpointing: true
recipe:
  name: lexvla
  prompt: 'words of "{{}}":'
  penalty_steps: 2
  image_penalty: 0.01
  text_penalty: 0.02
  adapter: {{heads: 2, hidden: 32, out_hidden: 24}}
  model:
    image_size: 32
    patch_size: 16
    text_length: 32
    embed_dim: 16
    image: {{width: 32, layers: 2, heads: 2, trained: false}}
    text: {{path: {folder}/lm, lora: {{rank: 2, alpha: 4}}}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
evals:
  - {{name: zero_shot, label: names, data: "{spec}", target: subgroup}}
log_every: 1 steps
"""


def save_language_model(folder: Path, *, tied: bool = False) -> Path:
    """A small causal language model and the tokenizer of its words."""
    captions = [str(pair["name"]) for pair in read_pairs()]
    tokenizer = train_tokenizer(captions, vocab_size=480, length=64)
    save_tokenizer(tokenizer, folder)
    settings = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


def config_in(folder: Path, *overrides: str) -> RunConfig:
    spec = write_shards(folder / "shards", count=24, per_shard=12)
    if not (folder / "lm").exists():
        save_language_model(folder / "lm")
    return parse_run(RUN.format(folder=folder, spec=spec), overrides)


def built(config: RunConfig):
    return load_recipe(config.recipe, context_of(config, Comm.solo(), tokenizer_of(config, SOLO)))


SOLO = Comm.solo()


@pytest.mark.parametrize("tied", [False, True])
def test_the_words_are_those_of_the_models_output(tmp_path: Path, tied: bool) -> None:
    path = save_language_model(tmp_path / "lm", tied=tied)
    whole = AutoModelForCausalLM.from_pretrained(path)
    rows = output_rows(str(path))
    assert torch.equal(rows, whole.lm_head.weight)
    tokenizer = load_tokenizer(str(path))
    ids = chosen_words(tokenizer, "words", count=len(rows))
    assert 2 < len(ids) < len(rows)
    assert torch.equal(ids, ids.unique())
    texts = [tokenizer.decode([token]) for token in ids.tolist()]
    assert all(text.startswith(" ") and text.strip().isalpha() for text in texts)
    assert " face" in texts
    everything = chosen_words(tokenizer, "all", count=len(rows))
    assert len(everything) == len(rows) - 3
    (tmp_path / "ids.txt").write_text("9\n4\n77\n")
    assert chosen_words(tokenizer, tmp_path / "ids.txt", count=99).tolist() == [4, 9, 77]


@pytest.mark.heavy
def test_wrong_folders_and_lists_in_one_sentence(tmp_path: Path) -> None:
    path = save_language_model(tmp_path / "lm")
    LlamaModel.from_pretrained(path).save_pretrained(tmp_path / "body")
    with pytest.raises(ConfigError, match="without its output embedding"):
        output_rows(str(tmp_path / "body"))
    tokenizer = load_tokenizer(str(path))
    for text, said in (("4 4", "1 different ids in 2"), ("a b", "no list"), ("4 500", "names id")):
        (tmp_path / "ids.txt").write_text(text)
        with pytest.raises(ConfigError, match=said):
            chosen_words(tokenizer, tmp_path / "ids.txt", count=400)
    for template in ("no place", "{} and {}"):
        with pytest.raises(ConfigError, match="once"):
            with_template(tokenizer, template, length=64)
    for override, said in (
        ("recipe.model.text_length=8", "set model.text_length to"),
        ("recipe.adapter.heads=3", "does not divide"),
        ("recipe.model.embed_dim=9", "embed_dim"),
    ):
        with pytest.raises(ConfigError, match=said):
            built(config_in(tmp_path, override))
    for override, said in (
        ("recipe.model.text.pooling=mean", "none to choose"),
        ("recipe.model.bias=true", "bias"),
        ("recipe.model.text={width: 32, layers: 2, heads: 2}", "model.text.path"),
    ):
        with pytest.raises(ConfigError, match=said):
            config_in(tmp_path, override)


def batch_of(config: RunConfig) -> Batch:
    stream = stream_of(config, SOLO, tokenizer_of(config, SOLO), micro_batch=8)
    batch = stream.take()[0]
    stream.close()
    return batch


@pytest.mark.heavy
def test_a_text_is_what_the_language_model_says_next(tmp_path: Path) -> None:
    """Before training, by transformers alone, and with rows that are filled on the left."""
    config = config_in(tmp_path)
    model, batch = built(config).model, batch_of(config)
    model.train()
    rows = model(batch).text.detach()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    tokenizer = load_tokenizer(str(tmp_path / "lm"))
    for row, tokens, mask in zip(rows, batch.tokens, batch.token_mask, strict=True):
        kept = tokens[mask]
        assert tokenizer.decode(kept[-3:]).endswith('":')
        with torch.no_grad():
            scores = whole(kept[None]).logits[0, -1, model.word_ids]
        wanted = normalize(torch.where(scores >= 0, scores + 1, scores.exp()), dim=0)
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-6)
    left = batch.token_mask.sort(dim=1).values
    shifted = torch.full_like(batch.tokens, tokenizer.pad_token_id)
    shifted[left] = batch.tokens[batch.token_mask]
    assert not torch.equal(left, batch.token_mask)
    filled_before = batch._replace(tokens=shifted, token_mask=left)
    assert torch.equal(model(filled_before).text.detach(), rows)
    tokenizer = with_template(load_tokenizer(str(tmp_path / "lm")), 'a "{}":', length=32)
    long = token_ids(tokenizer, ["face " * 90], length=32)[0]
    assert len(long) == 32
    assert tokenizer.decode(long[-4:]).endswith('":')


def dense_image(model, images: Tensor) -> Tensor:
    states = model.image.backbone(pixel_values=images).last_hidden_state
    scores = model.adapter(states) @ model.image_words.weight.T
    return normalize(torch.where(scores >= 0, scores + 1, scores.exp()).amax(dim=1), dim=1)


def test_an_image_says_its_loudest_patch_and_gradients_are_the_dense_ones(tmp_path: Path) -> None:
    config = config_in(tmp_path, "recipe.image_penalty=0")
    recipe, batch = built(config), batch_of(config)
    model = recipe.model.train()
    assert torch.equal(model.image_words.weight, model.text_words.weight)
    features = model(batch)
    losses = recipe.losses(features, batch, 1)
    losses.total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dense = dense_image(model, batch.images)
    torch.testing.assert_close(features.image, dense, rtol=1e-4, atol=1e-6)
    logits = model.logit_scale() * dense @ features.text.detach().T
    own = torch.arange(len(dense))
    cross = torch.nn.functional.cross_entropy
    (cross(logits, own) + cross(logits.T, own)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("adapter", "image_words")):
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert not any(name.startswith(("image.", "text_words")) for name in ours)
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in ours.items())
    used = features.text.mean(dim=0)
    overuse = len(used) * used.pow(3).sum() / used.sum()
    torch.testing.assert_close(losses["text_overuse"], overuse)
    assert losses.weights == pytest.approx(
        {"contrastive": 2.0, "image_overuse": 0.0, "text_overuse": 0.02 / 4}
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "states", "patches"),
    [("dinov2 with registers", 19, 16), ("deit", 18, 16), ("siglip", 16, 16), ("swin", 16, 16),
     ("convnext", 1, 1)],
)  # fmt: skip
def test_any_encoder_says_words_by_each_of_its_states(
    kind: str, states: int, patches: int, tmp_path: Path
) -> None:
    """A class token and registers before the patches, or stages that join patches on the way."""
    path, encoder = folders.save(tmp_path / "encoder", folders.IMAGES[kind])
    image = f"recipe.model.image={{path: {path}, trained: false}}"
    sizes = ("recipe.model.patch_size=null", image)
    config = config_in(tmp_path, *sizes)
    batch = batch_of(config)
    model, bare = (
        built(config_in(tmp_path, *sizes, f"recipe.class_token={said}")).model
        for said in ("true", "false")
    )
    with torch.no_grad():
        wanted = encoder(pixel_values=batch.images).last_hidden_state
        wanted = wanted.flatten(2).mT if wanted.dim() == 4 else wanted
        torch.testing.assert_close(model.image(batch.images), wanted, rtol=1e-5, atol=1e-5)
        said = model.patches(batch.images)
        assert (said.shape[1], model.patches_a_side(states) ** 2) == (states, patches)
        assert torch.equal(bare.patches(batch.images), said[:, states - patches :])


@pytest.mark.heavy
def test_small_coordinates_count_in_training_only(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    model, batch = built(config).model, batch_of(config)
    whole = model.train()(batch).image
    kept = model.eval()(batch).image
    least = 1 / math.sqrt(whole.shape[1])
    assert torch.equal(kept, torch.where(whole > least, whole, 0.0))
    assert (whole > 0).all()
    largest = built(config_in(tmp_path, "recipe.sparse=5")).model.eval()(batch).image
    assert ((largest > 0).sum(dim=1) == 5).all()
    bare = built(config_in(tmp_path, "recipe.class_token=false")).model.train()
    assert bare.patches(batch.images).shape[1] == 4
    torch.testing.assert_close(
        bare.patches(batch.images), model.patches(batch.images)[:, 1:], rtol=0, atol=1e-6
    )


def test_no_exported_form_is_made_up(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with pytest.raises(ConfigError, match="words of a language model"):
        export_model(built(config).model, tokenizer_of(config, SOLO), tmp_path / "exported")


def train_once(comm: Comm, *configs: RunConfig) -> int:
    from trainer.loop import train

    return [train(config).progress.step for config in configs][-1]


def train_and_again(comm: Comm, runs: list[RunConfig], again: RunConfig) -> None:
    """Each of the runs, and the last one anew from its middle."""
    train_once(comm, *runs)
    if comm.is_main:
        shutil.copytree(runs[-1].workdir, again.workdir)
        without_its_end(again.workdir)
    comm.barrier()
    train_once(comm, again)


def without_its_end(folder: Path) -> None:
    (last,) = (folder / "checkpoints").glob("*4*")
    shutil.rmtree(last)


def weights(folder: Path) -> dict[str, Tensor]:
    restored = Checkpointer(folder / "checkpoints", SOLO).latest()
    assert restored is not None
    return dict(restored.tensors("weights"))


def test_any_ranks_and_stage_learn_the_same_and_go_on_at_another_number(tmp_path: Path) -> None:
    """One rank under ZeRO-3; two under ZeRO-2 without checkpointing; one that goes on from the
    middle of theirs, where the penalties still grow; and one and two that go on from the middle of
    their own run, to the same bits."""
    kept = ["save_every=2 steps", "keep_checkpoints=3", "recipe.penalty_steps=6"]
    other, other_again = (
        config_in(
            *(tmp_path, f"workdir={tmp_path}/{name}", "deepspeed=ds_configs/zero2.json", *kept),
            "gradient_checkpointing=false",
        )
        for name in ("other", "other-again")
    )
    run_ranks(train_and_again, 2, [other], other_again, timeout_seconds=500)
    shutil.copytree(tmp_path / "other", tmp_path / "moved")
    without_its_end(tmp_path / "moved")
    moved, again = (
        config_in(tmp_path, f"workdir={tmp_path}/{name}", *kept) for name in ("moved", "run-again")
    )
    run = config_in(tmp_path, *kept)
    run_ranks(train_and_again, 1, [moved, run], again, timeout_seconds=500)
    for folder in ("run", "other"):
        first, second = weights(tmp_path / folder), weights(tmp_path / f"{folder}-again")
        assert first.keys() == second.keys()
        assert all(torch.equal(second[name], value) for name, value in first.items())
    ours = weights(tmp_path / "run")
    assert not any("text_words" in name or name.startswith("image.") for name in ours)
    assert any(name.startswith("image_words") for name in ours)
    assert any("lora_A" in name for name in ours)
    for folder in ("other", "moved"):
        theirs = weights(tmp_path / folder)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=2e-5)
    found = logged_results(tmp_path / "run")["names"]
    assert found == pytest.approx(evaluate_workdir(tmp_path / "run", SOLO)["names"])


@pytest.mark.slow
def test_four_ranks_under_every_stage_too(tmp_path: Path) -> None:
    """With checkpointing; and four that go on from what one rank had saved."""
    kept = ["save_every=2 steps", "keep_checkpoints=3"]
    run_ranks(train_once, 1, config_in(tmp_path, *kept), timeout_seconds=900)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    without_its_end(tmp_path / "moved")
    four = [
        config_in(
            *(tmp_path, f"workdir={tmp_path}/{name}", f"deepspeed=ds_configs/zero{stage}.json"),
            *kept,
        )
        for name, stage in (("zero0", 0), ("zero2", 2), ("zero3", 3), ("moved", 2))
    ]
    run_ranks(train_once, 4, *four, timeout_seconds=900)
    ours = weights(tmp_path / "run")
    for folder in ("zero0", "zero2", "zero3", "moved"):
        theirs = weights(tmp_path / folder)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=2e-5)
