"""`clip`, `siglip` and `protoclip` take views, SimCLR, BYOL and a teacher by keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from tests.fixtures.emoji import write_shards
from tests.fixtures.vectors import write_vectors
from tests.ranks import run_ranks
from tests.recipes.test_clip import outcome
from tests.recipes.test_clip_prototypes import parts, train_all, values
from tests.recipes.tiny_run import PROTOCLIP, tiny_run
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.data.tokenize import train_tokenizer
from trainer.errors import ConfigError
from trainer.losses.distill import soft_distillation
from trainer.models.self_supervised import SelfSupervisedTowers
from trainer.models.two_tower import TwoTower
from trainer.recipe import Recipe, load_recipe
from trainer.run import context_of, stream_of
from trainer.types import Batch, Losses, Progress

HEAD = "{hidden: 24, dim: 8, norm: layer}"
SIMCLR = f"simclr: {{weight: 0.5, temperature: 0.2, head: {HEAD}}}"
VIEWS = f"views: 2\n{SIMCLR}"
BYOL = f"byol: {{weight: 3.0, head: {HEAD}}}"
RECIPES: dict[str, tuple[str, ...]] = {
    "clip": (),
    "siglip": ("recipe.name=siglip", "recipe.model.bias=true"),
    "protoclip": (*PROTOCLIP, "recipe.model.head={dim: 8, layers: 1, hidden: 16, norm: layer}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("composition")
    spec = write_shards(made / "shards", count=24, per_shard=12)
    write_vectors(made / "image", spec, dim=10, seed=1, field="image", model="pair")
    write_vectors(made / "text", spec, dim=10, seed=2, model="pair")
    return made


def run_of(folder: Path, name: str, keys: str, *overrides: str, run: str = "") -> RunConfig:
    spec = str(folder / "shards" / "emoji-{000000..000001}.tar")
    return tiny_run(folder, run or name, spec, *RECIPES.get(name, ()), *overrides, keys=keys)


def teacher(folder: Path) -> str:
    stores = f"image_store: {folder}/image, text_store: {folder}/text"
    return f"distill: {{{stores}, logit_scale: 20, weight: 2.0}}"


def built(config: RunConfig) -> tuple[Recipe, Batch]:
    """The recipe of a run, and its first batch of eight."""
    tokenizer = train_tokenizer(["a text"], vocab_size=259, length=12)
    recipe = load_recipe(config.recipe, context_of(config, Comm.solo(), tokenizer))
    recipe.model.train()
    stream = stream_of(config, Comm.solo(), tokenizer, micro_batch=8)
    (batch,) = stream.take()
    stream.close()
    return recipe, batch


def losses_of(recipe: Recipe, batch: Batch) -> Losses:
    return recipe.losses(recipe.model(batch), batch, 0)


def gradients(recipe: Recipe, batch: Batch) -> dict[str, Tensor]:
    losses_of(recipe, batch).total.backward()
    return {n: p.grad for n, p in recipe.model.named_parameters() if p.grad is not None}


def test_clip_with_simclr_is_aclip_of_all_patches_without_its_copy(folder: Path) -> None:
    """To the last bit: the losses, and the gradient of every weight."""
    clip, batch = built(run_of(folder, "clip", VIEWS))
    keys = f"{VIEWS}\nbyol: null\nfrozen_patches: false\ntokens: {{keep: 1.0}}"
    aclip, same = built(run_of(folder, "clip", keys, "recipe.name=aclip"))
    assert batch.views is not None
    assert same.views is not None
    assert torch.equal(batch.views, same.views)
    ours, theirs = losses_of(clip, batch), losses_of(aclip, batch)
    assert ours.weights == theirs.weights == {"clip": 1.0, "simclr": 0.5}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found, wanted = gradients(clip, batch), gradients(aclip, batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_clip_with_caption_tokens_is_superclip_and_others_take_the_same_head(folder: Path) -> None:
    """To the last bit, with the gradient of the head's rows; elsewhere the same value."""
    clip, batch = built(run_of(folder, "clip", "caption_tokens: {weight: 0.5, scale: 20}"))
    superclip, _ = built(
        run_of(folder, "superclip", "weight: 0.5\nscale: 20", "recipe.name=superclip")
    )
    ours, theirs = losses_of(clip, batch), losses_of(superclip, batch)
    assert ours.weights == theirs.weights == {"clip": 1.0, "words": 0.5}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found, wanted = gradients(clip, batch), gradients(superclip, batch)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert clip.parts.keys() == superclip.parts.keys() == {"words", "frequencies"}
    for name in ("siglip", "protoclip"):
        other, _ = built(run_of(folder, name, "caption_tokens: {weight: 0.5, scale: 20}"))
        said = losses_of(other, batch)
        assert torch.equal(said["words"], ours["words"])
        assert said.weights["words"] == 0.5


@pytest.mark.parametrize("name", list(RECIPES))
def test_without_the_keys_the_model_and_the_loss_are_the_recipe_s_own(
    folder: Path, name: str
) -> None:
    recipe, batch = built(run_of(folder, name, ""))
    assert type(recipe.model) is TwoTower
    assert batch.views is None
    found = losses_of(recipe, batch)
    assert list(found) == ["siglip" if name == "siglip" else "clip"]


@pytest.mark.parametrize("name", list(RECIPES))
def test_each_term_is_what_float64_says_of_views_run_one_by_one(folder: Path, name: str) -> None:
    config = run_of(folder, name, f"{VIEWS}\n{BYOL}\n{teacher(folder)}")
    recipe, batch = built(config)
    target = normalize(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    batch = batch._replace(more={"byol_target": target})
    model: Any = recipe.model
    assert isinstance(model, SelfSupervisedTowers)
    features = model(batch)
    found = recipe.losses(features, batch, 0)
    wanted = naive(model, batch, target, sigmoid=name == "siglip")
    said: Any = recipe.parts["teacher"]
    pair = soft_distillation(
        *(features.image, features.text, features.logit_scale),
        *(*said.vectors(batch), 20.0, Comm.solo()),
    )
    wanted["distill"] = pair.loss.double()
    main = "siglip" if name == "siglip" else "clip"
    weights = {main: 1.0, "simclr": 0.5, "byol": 3.0, "distill": 2.0, "distill_divergence": 0.0}
    assert found.weights == weights
    for term, value in wanted.items():
        assert found[term].item() == pytest.approx(value.item(), rel=2e-5), term
    total = sum(weights[term] * float(value.detach()) for term, value in wanted.items())
    assert found.total.item() == pytest.approx(total, rel=2e-5)


def naive(model: Any, batch: Batch, target: Tensor, *, sigmoid: bool) -> dict[str, Tensor]:
    """Without a text for a view twice, a batch of views or a mask: loops over pairs."""
    assert batch.images is not None
    assert batch.views is not None
    views = [batch.images, batch.views[:, 0]]
    pooled = [model.image.pooled(view) for view in views]
    text = normalize(model.text.texts(batch.tokens, batch.token_mask).double(), dim=1)
    images = [normalize(model.image.projection(rows).double(), dim=1) for rows in pooled]
    own, scale = torch.arange(8), model.logit_scale().double()
    main = []
    for image in images:
        logits = scale * image @ text.T
        if sigmoid:
            signs = 2 * torch.eye(8, dtype=torch.double) - 1
            main.append(-logsigmoid(signs * (logits + model.logit_bias())).sum() / 8)
        else:
            main.append((cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2)
    heads = [normalize(model.simclr_head(rows).double(), dim=1) for rows in pooled]
    both = torch.cat(heads)
    pairs = []
    for row in range(16):
        others = [other for other in range(16) if other != row]
        cosines = torch.stack([both[row] @ both[other] for other in others]) / 0.2
        pairs.append(cosines.logsumexp(0) - cosines[others.index((row + 8) % 16)])
    says = [
        normalize(model.byol_predictor(model.byol_projector(p)).double(), dim=1) for p in pooled
    ]
    byol = [(said - target).square().sum(1) for said in says]
    return {
        "siglip" if sigmoid else "clip": torch.stack(main).mean(),
        "simclr": torch.stack(pairs).mean(),
        "byol": torch.cat(byol).mean(),
    }


class Recorder:
    """A stream's samples, and what a phase asks of a model about them."""

    def __init__(self, stream: Any, model: Any) -> None:
        self.stream, self.model, self.seen = stream, model, list[Batch]()

    def view(self, start: int, count: int, **options: Any) -> Iterator[Batch]:
        yield from self.stream.view(start, count, **options)

    @torch.no_grad()
    def encode(self, batch: Batch) -> Any:
        self.seen.append(batch)
        self.model.eval()
        return self.model(batch)


def test_an_episode_is_clustered_by_one_view_that_training_does_not_see(folder: Path) -> None:
    """And training reads two of each image, in the order of the run."""
    config = run_of(folder, "protoclip", VIEWS)
    recipe, _ = built(config)
    tokenizer = train_tokenizer(["a text"], vocab_size=259, length=12)
    stream = stream_of(config, Comm.solo(), tokenizer, micro_batch=4)
    recorder = Recorder(stream, recipe.model)
    assert recipe.phase_due(Progress())
    recipe.begin_phase(Progress(), recorder.encode, recorder)
    embedded = {
        int(sample): image
        for batch in recorder.seen
        for sample, image in zip(batch.sample_id, _images(batch), strict=True)
    }
    assert all(batch.views is None for batch in recorder.seen), "one view is encoded"
    trained = [batch for _ in range(2) for batch in stream.take()]
    stream.close()
    assert [len(batch.sample_id) for batch in trained] == [4] * 4
    ids = [int(sample) for batch in trained for sample in batch.sample_id]
    assert sorted(embedded) == sorted(ids), "an episode is the stretch that is trained on next"
    for batch in trained:
        assert batch.views is not None
        assert batch.views.shape[:2] == (4, 1)
        for sample, image, view in zip(batch.sample_id, _images(batch), batch.views, strict=True):
            assert not torch.equal(image, view[0])
            assert not torch.equal(image, embedded[int(sample)])
    labelled: Any = recipe
    labels = labelled.episode.labels["image"].of(torch.tensor(ids))
    assert bool((labels >= 0).all()), "every sample of the episode has a group"


def _images(batch: Batch) -> Tensor:
    assert batch.images is not None
    return batch.images


TERMS = {"clip": "clip", "siglip": "siglip", "protoclip": "clip"}


def test_the_keys_are_equal_on_any_ranks_and_micro_batches_and_go_on(folder: Path) -> None:
    """One rank with two micro-batches, two with one or two, ZeRO-3; ProtoCLIP through two episodes
    of two views, with tokens that a copy scores."""
    keys = {
        "clip": f"{VIEWS}\n{BYOL}",
        "siglip": f"{VIEWS}\n{teacher(folder)}",
        "protoclip": f"{VIEWS}\n{teacher(folder)}\ntokens: {{keep: 0.5, group: 1}}",
    }
    alone, pair = (
        [
            run_of(
                folder, n, keys[n], f"micro_batch={micro}", "optim.epsilon=0.001", run=f"{n}-{w}"
            )
            for n in keys
        ]
        for w, micro in ((1, 4), (2, 2))
    )
    again = pair[-1].model_copy(update={"workdir": folder / "again"})
    run_ranks(train_all, 1, alone, None, timeout_seconds=500)
    cut = (pair[-1].workdir, again.workdir)
    run_ranks(train_all, 2, [*pair, again], cut, timeout_seconds=900)
    for one, two in zip(alone, pair, strict=True):
        lines = list(zip(values(one.workdir), values(two.workdir), strict=True))
        for left, right in lines:
            for term in (TERMS[one.recipe.name], "simclr", "loss", "gradient_norm"):
                assert right[term] == pytest.approx(left[term], rel=1e-3), (one.recipe.name, term)
    resumed, whole = outcome(again.workdir)[0], outcome(pair[-1].workdir)[0]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    own, theirs = parts(pair[-1].workdir), parts(again.workdir)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())


def test_mistakes_are_named(folder: Path) -> None:
    for keys, said in (
        (SIMCLR, "simclr compares views of an image: set views=2, or simclr=null"),
        ("momentum_copy: {momentum: 0.5}", "momentum_copy is not read"),
        ("views: 0", "views"),
        ("distill: {}", "give either `image_store` and `text_store`, or `model`"),
    ):
        for name in RECIPES:
            with pytest.raises(ConfigError, match=said):
                run_of(folder, name, keys)
