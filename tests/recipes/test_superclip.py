"""SuperCLIP and SuperClass: the published dense loss, and the same run on any ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import DataConfig, RunConfig, parse_run
from trainer.data.tokenize import tokenize, train_tokenizer
from trainer.errors import CheckpointError, ConfigError
from trainer.losses.token_classes import each_token_once
from trainer.parts.caption_tokens import TokenFrequencies
from trainer.recipe import Context, load_recipe
from trainer.run import refuse_text_evals
from trainer.settings.recipe_files import recipe_config
from trainer.types import Batch, Features

TEXTS = ["a red cat", "a cat", "red red sea", "the sea", "a boat", "the red boat", "", "a sea cat"]
GLOBAL, STEPS, SCALE, DIM = 8, 3, 10.0, 6
TOWER = {"width": 32, "layers": 1, "heads": 2}
IMAGES = {"image_size": 32, "patch_size": 16, "embed_dim": 16, "image": TOWER}
RECIPES: dict[str, dict[str, Any]] = {
    "superclip": {"model": {**IMAGES, "text": TOWER, "text_length": 12, "vocabulary": 300}},
    "superclass": {"model": IMAGES, "captions": {"length": 12, "vocabulary": 300}},
}


def batches(comm: Comm) -> list[tuple[Tensor, Batch]]:
    """Features of this rank and their captions, for each step; another order every time."""
    tokenizer = small_tokenizer()
    found = []
    for step in range(STEPS):
        texts = TEXTS[step:] + TEXTS[:step]
        tokens, mask = tokenize(tokenizer, [*texts[: 4 + step], *texts[:1] * 8][:GLOBAL], length=12)
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(GLOBAL, DIM, dtype=torch.float64, generator=generator)
        own = slice(*comm.row_range(GLOBAL))
        found.append((rows[own], Batch(None, tokens[own], mask[own], torch.arange(GLOBAL)[own])))
    return found


def small_tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocab_size=280, length=12)


def steps_of(comm: Comm, folder: str) -> list[dict[str, Tensor]]:
    model = {**IMAGES, "embed_dim": DIM}
    settings = {
        "name": "superclass",
        "model": model,
        "scale": SCALE,
        "head": {"init_deviation": 1.0},
        "captions": {"length": 12, "vocabulary": 280},
    }
    data = DataConfig(train="none.tar")
    context = Context(comm, small_tokenizer(), 0, GLOBAL, STEPS, workdir=Path(folder), data=data)
    recipe: Any = load_recipe(recipe_config(settings), context)
    head, found = recipe.parts["words"], []
    for step, (rows, batch) in enumerate(batches(comm)):
        leaf = rows.clone().requires_grad_()
        before = head.rows.clone()
        losses = recipe.losses(Features(image=normalize(leaf, dim=1)), batch, step)
        losses.total.backward()
        assert head.gradients_finite()
        seen = {"loss": losses["words"].detach(), "rows": before, "image_gradient": leaf.grad}
        found.append({**seen, "row_gradient": head._gradient.clone()})
        for part in recipe.parts.values():
            # The step in the middle is not applied, so its captions are not counted either.
            part.after_step(step, applied=step != 1, learning_rate_factor=1.0)
    return found


def published(table: Tensor, rows: Tensor, tokens: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """Dense targets, reweighted by running means over steps of the share of captions, in place."""
    size, shares = len(table), state[0]
    targets = torch.zeros(GLOBAL, size, dtype=torch.float64).scatter(1, tokens, 1.0)
    targets[:, small_tokenizer().all_special_ids] = 0
    shares += targets.mean(0)
    state[1].add_(1)
    targets = targets * ((state[1] + 1 / GLOBAL) / (shares + 1 / GLOBAL)).log()
    logits = SCALE * normalize(rows, dim=1) @ normalize(table, dim=1).T
    loss: Tensor = -(log_softmax(logits, 1) * normalize(targets, p=1, dim=1)).sum(1).mean()
    return loss


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loss_and_its_gradients_are_the_published_dense_ones(
    tmp_path: Path, world_size: int
) -> None:
    ranks = run_ranks(steps_of, world_size, str(tmp_path))
    size = len(small_tokenizer())
    state = torch.zeros(size, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for step, (rows, batch) in enumerate(batches(Comm.solo())):
        own = [rank[step] for rank in ranks]
        table = torch.cat([one["rows"] for one in own]).double().requires_grad_()
        leaf = rows.clone().requires_grad_()
        kept = [value.clone() for value in state]
        loss = published(table, leaf, batch.tokens, state)
        loss.backward()
        for one in own:
            torch.testing.assert_close(one["loss"], loss.detach(), rtol=1e-9, atol=0)
        image = torch.cat([one["image_gradient"] for one in own]) / world_size
        torch.testing.assert_close(image, leaf.grad, rtol=0, atol=1e-9)
        gradient = torch.cat([one["row_gradient"] for one in own]).double()
        torch.testing.assert_close(gradient, table.grad, rtol=0, atol=1e-7)
        if step == 1:
            for value, old in zip(state, kept, strict=True):
                value.copy_(old)
    moved = torch.cat([rank[2]["rows"] - rank[0]["rows"] for rank in ranks])
    assert float(moved.abs().max()) > 0


def test_each_token_counts_once_and_those_of_the_tokenizer_not() -> None:
    tokens = torch.tensor([[2, 9, 5, 9, 1, 0], [2, 1, 0, 0, 0, 0]])
    found = each_token_once(tokens, torch.tensor([0, 1, 2]))
    assert found.tolist() == [[-1, -1, -1, 5, 9, -1], [-1] * 6]


def test_what_all_captions_hold_weighs_nothing_and_rare_tokens_most() -> None:
    part = TokenFrequencies(4, Comm.solo())
    weights = part.weights(torch.tensor([[0, 1, -1], [0, 2, 1], [0, -1, -1]]))
    wanted = torch.tensor([4 / 4, 4 / 3, 4 / 2, 4 / 1], dtype=torch.float64).log()
    torch.testing.assert_close(weights, wanted)
    part.after_step(0, applied=True, learning_rate_factor=1.0)
    assert part.state_share()["counts"].tolist() == [3, 2, 1, 0, 3]
    with pytest.raises(CheckpointError, match="counts of 6 tokens, and the tokenizer has 4"):
        part.load_state_dict({"counts": torch.zeros(7, dtype=torch.int64)})


def config_in(folder: Path, name: str, **changes: Any) -> RunConfig:
    """`<recipe>-<ranks>-<stage>`."""
    recipe, _, stage, *_ = name.split("-")
    spec = str(folder / "shards" / "emoji-{000000..000001}.tar")
    if not (folder / "shards").exists():
        write_shards(folder / "shards", count=40, per_shard=20)
    values = {
        "workdir": str(folder / name),
        "steps": 3,
        "global_batch": 8,
        "micro_batch": 4,
        "deepspeed": f"ds_configs/{stage}.json",
        "recipe": {"name": recipe, "scale": 8.0, **RECIPES[recipe]},
        "data": {"train": spec, "captions": {"fields": ["txt", "name"]}},
        "optim": {"learning_rate": 0.003, "epsilon": 1e-3},
        "log_every": "1 steps",
        "save_every": "1 steps",
        "keep_checkpoints": 9,
    }
    return parse_run(json.dumps(values | changes))


def train_each(comm: Comm, cases: list[tuple[RunConfig, RunConfig | None]]) -> None:
    from trainer.loop import train

    for config, other in cases:
        if other is not None and comm.is_main:
            for part in ("checkpoints/step-00000002", "tokenizer"):
                shutil.copytree(other.workdir / part, config.workdir / part)
        comm.barrier()
        assert train(config).finished


def tensors(folder: Path, name: str, group: str) -> dict[str, Tensor]:
    found = (folder / name / "checkpoints/step-00000003").glob(f"{group}-*.safetensors")
    return {key: value for path in found for key, value in load_file(path).items()}


def test_runs_go_on_at_another_number_of_ranks_and_stage(tmp_path: Path) -> None:
    names = ("superclip-2-zero3", "superclass-2-zero2")
    again = ("superclip-1-zero0", "superclass-1-zero3")
    whole = [config_in(tmp_path, name) for name in names]
    model = RECIPES["superclip"]
    silent = {"name": "superclip", "weight": 0.0, **model}
    off = config_in(tmp_path, "superclip-off-zero3", recipe=silent)
    clip = config_in(tmp_path, "superclip-clip-zero3", recipe={"name": "clip", **model})
    two = [(config, None) for config in (*whole, off, clip)]
    run_ranks(train_each, 2, two, timeout_seconds=400)
    ours, plain = (tensors(tmp_path, c.workdir.name, "weights") for c in (off, clip))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], value) for key, value in plain.items()), "0 is CLIP"
    cases = [(config_in(tmp_path, n), other) for n, other in zip(again, whole, strict=True)]
    run_ranks(train_each, 1, cases, timeout_seconds=400)
    for one, other in zip(names, again, strict=True):
        found, wanted = (tensors(tmp_path, name, "weights") for name in (other, one))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5, msg=key)
        counts = [tensors(tmp_path, name, "parts")["frequencies/counts"] for name in (one, other)]
        assert torch.equal(*counts)
        assert int(counts[0][-1]) == 24
        lines = (tmp_path / one / "metrics.jsonl").read_text().splitlines()
        # Of some three hundred tokens: a guess costs 5.7 nats.
        assert 5 < json.loads(lines[0])["values"]["words"] < 12
    assert not any(key.startswith("text.") for key in tensors(tmp_path, names[1], "weights"))


def test_mistakes_in_one_sentence(tmp_path: Path) -> None:
    words = {"length": 12, "tokenizer": "somewhere"}
    recipe = {"name": "superclass", **RECIPES["superclass"], "captions": words}
    with pytest.raises(ConfigError, match="a `tokenizer`, with `vocabulary: null`, or"):
        config_in(tmp_path, "superclass-1-zero0", recipe=recipe)
    entry = {"name": "retrieval", "label": "texts", "data": "none.tar"}
    with pytest.raises(ConfigError, match="the model of superclass reads none"):
        refuse_text_evals(config_in(tmp_path, "superclass-1-zero0", evals=[entry]))
