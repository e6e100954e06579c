"""PALM on frozen features: what was stored once stands in the place of images, everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.cluster.stores import identity
from tests.data.tars import write_tar
from tests.ranks import run_ranks
from tests.recipes.test_mlcd import changed, shards_without_captions
from tests.recipes.test_palm import RUN, SOLO, built, state_of, train_each
from trainer.config import RunConfig, parse_run
from trainer.data.decode import BadSample
from trainer.data.index import write_index
from trainer.data.shards import ShardSet
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.models.tower import Tower
from trainer.models.views_tower import ViewsTower
from trainer.programs.workdir import evaluate_workdir, open_workdir
from trainer.run import stored_of, stream_of
from trainer.store import StoreWriter
from trainer.store.images import StoredImages

DIM, VIEWS = 12, 3


def write_features(folder: Path, spec: str, *, views: int = VIEWS, seed: int = 0, **kind) -> Path:
    """Vectors of every sample of the shards, in no order, of the whole image and of views."""
    shards = ShardSet.open(spec)
    what = identity(kind.pop("dim", DIM), 1 + views).model_copy(update=kind)
    named = list(zip(shards.names, shards.digests, shards.sizes, strict=True))
    writer = StoreWriter.begin(folder, what, {name: (d, size) for name, d, size in named})
    writer.announce()
    draw = torch.Generator().manual_seed(seed)
    first = 0
    for name, _, size in named:
        ids = np.asarray(shards.ids[first : first + size])[::-1].copy()
        rows = torch.randn(size, 1, what.dim, generator=draw)
        spread = 0.3 * torch.randn(size, 1 + views, what.dim, generator=draw)
        writer.write(name, ids, rows + spread)
        first += size
    writer.finish()
    return folder


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("stored")
    spec = shards_without_captions(folder)
    other = str(folder / "shards" / "emoji-000002.tar")
    write_features(folder / "train", spec)
    write_features(folder / "other", other, views=0, seed=1)
    text = RUN.replace(
        "    image_size: 32\n    patch_size: 16\n    embed_dim: 16\n"
        "    image: {{width: 32, layers: 1, heads: 2}}\n",
        f"    embed_dim: 10\n    image: {{{{stored: {{{{folders: [{{folder}}/train, "
        f"{{folder}}/other], dim: {DIM}, width: 16}}}}}}}}\n",
    )
    text += (
        "evals:\n  - {{name: ood, label: far, train: '{first}', data: '{second}', target: subgroup,"
        " outside: {{other: '{other}'}}, scores: [mahalanobis, knn, prototype]}}\n"
    )
    first, second = ShardSet.open(spec).shards
    places = {"folder": folder, "spec": spec, "first": first, "second": second, "other": other}
    return parse_run(text.format(**places))


class _AsImages(nn.Module):
    """An encoder that says what its pixels are."""

    def forward(self, pixel_values):
        return type("Output", (), {"pooler_output": pixel_values.flatten(1)})


def test_it_is_the_recipe_on_pixels_whose_frozen_encoder_is_the_identity(base, tmp_path):
    """Losses, gradients of the head and prototypes of three steps, on the run's own stream."""
    config = changed(
        base,
        *(f"workdir={tmp_path}", f"recipe.model.embed_dim={DIM}"),
        "recipe.model.image={projection: none, stored: {folders: ["
        f"{base.recipe.model.image.stored.folders[0]}], dim: {DIM}, layers: 0}}}}",
    )
    stored, plain = built(config), built(config)
    tower = Tower(_AsImages(), nn.Identity(), pool="own", trained=False)
    plain.model = ViewsTower(config.recipe.model, image=tower, image_head=plain.model.image_head)
    stream = stream_of(config, SOLO, None, micro_batch=12)
    seen = []
    for step, (batch,) in enumerate(stream.take() for _ in range(3)):
        assert batch.images.shape == (12, DIM)
        pixels = batch._replace(
            images=batch.images.view(12, 3, 2, 2), views=batch.views.view(12, 1, 3, 2, 2)
        )
        terms = []
        for recipe, read in ((stored, batch), (plain, pixels)):
            losses = recipe.losses(recipe.model(read), read, step)
            losses.total.backward()
            optimizer = torch.optim.SGD(recipe.model.parameters(), lr=0.1)
            optimizer.step()
            optimizer.zero_grad()
            recipe.prototypes.after_step(step, applied=True, learning_rate_factor=1.0)
            terms.append(losses.total.detach())
        torch.testing.assert_close(terms[0], terms[1], rtol=1e-6, atol=0)
        seen.append(terms[0])
    stream.close()
    assert len({float(term) for term in seen}) == 3
    torch.testing.assert_close(stored.prototypes.rows, plain.prototypes.rows, rtol=1e-6, atol=1e-6)
    ours, theirs = (dict(recipe.model.named_parameters()) for recipe in (stored, plain))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)


def test_a_visit_reads_different_views_by_a_hash_and_an_evaluation_the_whole_image(base):
    images = stored_of(base)
    sample = int(ShardSet.open(base.data.train).ids[3])
    vectors = images.stores[0].vectors(torch.tensor([sample]))[0]
    seen = set()
    for epoch in range(40):
        pair = images.views(sample, epoch, 2, purpose="train")
        which = [int((vectors == row).all(dim=1).nonzero()[0, 0]) for row in pair]
        assert 0 not in which
        assert len(set(which)) == 2
        seen.add(tuple(which))
        again = StoredImages(images.folders, dim=DIM, seed=base.seed)
        assert torch.equal(again.views(sample, epoch, 2, purpose="train"), pair)
    assert len(seen) == VIEWS * (VIEWS - 1)
    assert torch.equal(images.whole(sample), vectors[0])
    with pytest.raises(BadSample, match="no vector"):
        images.whole(5)


def test_ranks_change_nothing_and_figures_are_those_of_the_workdir_opened_again(base, tmp_path):
    """Two ranks with the classes divided between them, one rank in micro-batches."""
    pair, alone = (changed(base, f"workdir={tmp_path}/{name}") for name in ("pair", "alone"))
    run_ranks(train_each, 2, [pair], timeout_seconds=200)
    run_ranks(train_each, 1, [changed(alone, "micro_batch=6")], timeout_seconds=200)
    expected, found = (state_of(tmp_path / name) for name in ("pair", "alone"))
    assert found.keys() == expected.keys()
    assert expected["prototypes"].shape[1] == 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    said = [json.loads(line) for line in _lines(tmp_path / "pair" / "events.jsonl")]
    logged = next(each for each in said if each["event"] == "far")
    figures = evaluate_workdir(tmp_path / "pair", SOLO)["far"]
    assert figures["outside/other"] == 20
    for name, value in figures.items():
        assert value == pytest.approx(logged[name], abs=1e-3)

    # Features of another encoder have the same shape and are refused all the same.
    spec = base.data.train
    others = write_features(tmp_path / "others", spec, model="1" * 64)
    places = f"recipe.model.image.stored.folders=[{others}]"
    with pytest.raises(CheckpointError, match="not those that this run began with"):
        open_workdir(tmp_path / "pair", SOLO, [places])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("recipe.model.image.width=32", "drop width"),
        ("recipe.model.image.trained=false", "drop trained"),
        ("recipe.model.image.pooling=mean", "drop pooling"),
        ("recipe.model.image_size=48", "no pixels"),
        ("recipe.model.patch_size=8", "no pixels"),
        ("recipe.model.image.stored.folders=[]", "at least 1"),
        ("data.augment.flip=0.9", "data.augment is of pixels"),
        ("data.cache_mib=5", "data.cache_mib is of pixels"),
        ("recipe.model.image.stored.layers=0", "width"),
        ("recipe.name=unicom", "unicom|head"),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(base, override, reason):
    with pytest.raises(ConfigError, match=reason):
        changed(base, override)


def test_stores_that_do_not_fit_are_named_before_anything_is_trained(base, tmp_path):
    spec = base.data.train
    start = "recipe.model.image.stored"
    few = write_features(tmp_path / "few", spec, views=1)
    whole = write_features(tmp_path / "whole", spec, views=0)
    wide = write_features(tmp_path / "wide", spec, dim=DIM + 1)
    pooled = write_features(tmp_path / "pooled", spec, pooling="cls")
    first = base.recipe.model.image.stored.folders[0]
    name = Path(ShardSet.open(spec).shards[0]).name
    second = tmp_path / "data" / name  # another shard of this name
    second.parent.mkdir()
    write_tar(second, {"000": {"png": b"none"}})
    write_index(str(second))
    twin = write_features(tmp_path / "twin", str(second))
    for overrides, reason in [
        ([f"{start}.folders=[{few}]"], "1 random views of a sample, and the recipe compares 2"),
        ([f"{start}.folders=[{whole}]"], "the whole image alone"),
        ([f"{start}.folders=[{wide}]"], f"{start}.dim={DIM + 1}"),
        ([f"{start}.folders=[{first}, {pooled}]"], "not of one encoder: their pooling differs"),
        ([f"{start}.folders=[{first}, {twin}]"], "can't be told apart"),
        ([f"{start}.folders=[{tmp_path}/nowhere]"], "no embedding store"),
        (["recipe.model.image.projection=none"], "set model.embed_dim=16"),
    ]:
        with pytest.raises((ConfigError, DataError), match=reason):
            built(changed(base, *overrides))
    assert built(changed(base, f"{start}.folders=[{whole}]", "recipe.views=1"))


def test_a_sample_without_a_vector_is_a_bad_sample(base, tmp_path):
    """Half of the shards are in the store: a substitute is read, and the ledger says why."""
    half = ShardSet.open(base.data.train).shards[0]
    folder = write_features(tmp_path / "half", half)
    config = changed(
        base,
        *(f"workdir={tmp_path}/run", f"recipe.model.image.stored.folders=[{folder}]"),
        "data.bad_sample_budget=0.95",
    )
    stream = stream_of(config, SOLO, None, micro_batch=12)
    known = set(ShardSet.open(half).ids.tolist())
    for (batch,) in (stream.take() for _ in range(3)):
        assert set(batch.sample_id.tolist()) <= known
    stream.close()
    reasons = [
        json.loads(line)["reason"] for line in _lines(tmp_path / "run" / "ledger" / "rank-0.jsonl")
    ]
    assert all("no vector in" in reason for reason in reasons)
    assert reasons
