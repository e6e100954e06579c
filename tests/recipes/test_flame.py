"""FLAME: which vectors are drawn, what learns, and the same run on any ranks. Numbers are of B6."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tests.fixtures.emoji import write_shards
from tests.fixtures.vectors import write_vectors
from tests.ranks import run_ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.errors import CheckpointError, ConfigError
from trainer.programs.workdir import evaluate_workdir, logged_results, open_workdir
from trainer.recipe import load_recipe
from trainer.recipes.flame import drawn_texts
from trainer.run import context_of, stream_of
from trainer.store import EmbeddingStore
from trainer.types import Batch

VECTORS, DIM = 11, 8
RUN = """
workdir: {folder}/run
steps: 4
global_batch: 8
micro_batch: 2
deepspeed: ds_configs/zero3.json
recipe:
  name: flame
  store: {folder}/store
  head_hidden: 24
  model: {{image_size: 32, patch_size: 16, embed_dim: 8, image: {{width: 32, layers: 2, heads: 2}}}}
data: {{train: "{spec}"}}
optim: {{learning_rate: 0.003}}
evals:
  - name: retrieval
    label: names
    data: "{spec}"
    text_store: {folder}/store
    text_vectors: [0, 1]
log_every: 1 steps
"""


def config_in(folder: Path, *overrides: str) -> RunConfig:
    spec = write_shards(folder / "shards", count=24, per_shard=12)
    if not (folder / "store").exists():
        write_vectors(folder / "store", spec, vectors=VECTORS, dim=DIM)
    return parse_run(RUN.format(folder=folder, spec=spec), overrides)


def built(config: RunConfig):
    return load_recipe(config.recipe, context_of(config, Comm.solo(), None))


def test_six_of_eleven_by_seed_epoch_and_id() -> None:
    """Distinct, evenly drawn, and nothing but these three decides."""
    ids = torch.arange(4000) * 7919
    epoch = torch.zeros(4000, dtype=torch.int64)
    drawn = drawn_texts(ids, epoch, count=6, total=11, key=1)
    assert all(len(set(row)) == 6 for row in drawn.tolist())
    shares = torch.bincount(drawn.flatten(), minlength=11) / 4000
    assert (shares - 6 / 11).abs().max() < 0.04  # five standard deviations
    together = ((drawn == 0).any(1) & (drawn == 1).any(1)).float().mean()
    assert abs(together - 6 / 11 * 5 / 10) < 0.04
    back = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn_texts(ids[back], epoch, count=6, total=11, key=1), drawn[back])
    for other in (
        drawn_texts(ids, epoch + 1, count=6, total=11, key=1),
        drawn_texts(ids, epoch, count=6, total=11, key=2),
    ):
        assert (other.sort(1).values == drawn.sort(1).values).all(1).float().mean() < 0.02


def test_a_visit_reads_its_own_samples_vectors_whatever_the_workers(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    store = EmbeddingStore.open(tmp_path / "store")
    everything = normalize(store.vectors(torch.from_numpy(store.ids.copy())), dim=-1)
    place = {int(i): row for row, i in enumerate(store.ids)}
    seen = []
    for workers in (0, 1):
        spread = config.model_copy(
            update={"data": config.data.model_copy(update={"workers": workers})}
        )
        stream = stream_of(spread, Comm.solo(), None, micro_batch=8)
        batches = [stream.take()[0] for _ in range(6)]
        stream.close()
        seen.append(torch.stack([batch.texts for batch in batches]))
        assert [int(batch.epoch[0]) for batch in batches] == [0, 0, 0, 1, 1, 1]
        for batch, texts in zip(batches, seen[-1], strict=True):
            for sample, rows in zip(batch.sample_id.tolist(), texts, strict=True):
                same = (rows[:, None] == everything[place[sample]]).all(-1)
                assert same.sum(1).eq(1).all(), "each is one of the sample's vectors"
                assert same.sum(0).max() == 1, "none is drawn twice"
    assert torch.equal(*seen)
    assert not torch.equal(seen[0][:3], seen[0][3:])


def one_batch(count: int = 4) -> Batch:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(pixels, None, None, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def test_everything_learns_and_nothing_is_of_texts(tmp_path: Path) -> None:
    """Vision transformer, head, scale and bias, each with a gradient; no unused norm."""
    recipe = built(config_in(tmp_path))
    ids = torch.from_numpy(EmbeddingStore.open(tmp_path / "store").ids[:4].copy())
    texts = recipe.config.join(0)(ids, torch.zeros(4, dtype=torch.int64))
    batch = one_batch()._replace(sample_id=ids, texts=texts)
    recipe.losses(recipe.model(batch), batch, 0).total.backward()
    for name, parameter in recipe.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    tops = {name.split(".")[0] for name, _ in recipe.model.named_parameters()}
    assert tops == {"image", "logit_scale", "logit_bias"}
    nce = built(config_in(tmp_path, "recipe.loss=mp_nce"))
    assert nce.model(batch).logit_bias is None
    assert nce.losses(nce.model(batch), batch, 0)["mp_nce"] > 0


def test_the_class_token_is_left_out_and_the_order_of_patches_too(tmp_path: Path) -> None:
    model = built(config_in(tmp_path)).model.eval()
    batch = one_batch()
    plain = model(batch).image

    def changed(_module, _inputs, output):
        states = output.last_hidden_state
        output["last_hidden_state"] = torch.cat([states[:, :1] + 5.0, states[:, 1:].flip(1)], 1)
        return output

    model.image.backbone.register_forward_hook(changed)
    torch.testing.assert_close(model(batch).image, plain, atol=1e-6, rtol=0)


def train_once(comm: Comm, config: RunConfig) -> int:
    from trainer.loop import train

    return train(config).progress.step


def weights(folder: Path) -> dict[str, torch.Tensor]:
    restored = Checkpointer(folder / "checkpoints", Comm.solo()).latest()
    assert restored is not None
    return dict(restored.tensors("weights"))


def digest(folder: Path) -> str:
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]
    return " ".join(digests)


def test_any_ranks_split_and_stage_end_with_the_same_weights(tmp_path: Path) -> None:
    """One rank with four micro-batches under ZeRO-3, two ranks with two under ZeRO-2; the store's
    bytes stay, and checkpoints hold nothing of texts."""
    config = config_in(tmp_path)
    before = digest(tmp_path / "store")
    other = config_in(
        tmp_path, f"workdir={tmp_path}/other", "deepspeed=ds_configs/zero2.json", "micro_batch=2"
    )
    run_ranks(train_once, 1, config, timeout_seconds=300)
    run_ranks(train_once, 2, other, timeout_seconds=300)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    assert not any("text" in name for name in ours)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)
    assert digest(tmp_path / "store") == before
    trained = open_workdir(tmp_path / "run", Comm.solo())
    expected = built(config).model.eval()
    expected.load_state_dict(ours)
    for found, wanted in zip(trained.model(one_batch()), expected(one_batch()), strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)
    logged = logged_results(tmp_path / "run")["names"]
    assert logged == pytest.approx(evaluate_workdir(tmp_path / "run", Comm.solo())["names"])
    assert logged["texts"] == 24.0


def test_mistakes_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed_dim is 9, .* set recipe.model.embed_dim=8"):
        built(config_in(tmp_path, "recipe.model.embed_dim=9"))
    with pytest.raises(ConfigError, match=r"texts_per_visit is 12, but .* has 11 vectors"):
        built(config_in(tmp_path, "recipe.texts_per_visit=12"))


def test_a_run_does_not_go_on_with_other_vectors(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    state = built(config).parts["store"].state_share()
    recipe = built(config)
    recipe.parts["store"].load_state_dict(state)
    write_vectors(tmp_path / "other", config.data.train, vectors=VECTORS, dim=DIM, seed=1)
    other = built(config_in(tmp_path, f"recipe.store={tmp_path}/other"))
    with pytest.raises(CheckpointError, match="teacher texts are not those"):
        other.parts["store"].load_state_dict(state)
