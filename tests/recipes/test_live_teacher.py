"""CLIP beside a frozen pair that runs on the student's views: what it says, whole or sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate, normalize
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.models import folders
from tests.models.folders import TEXTS, save
from tests.models.small import LENGTH, texts, word_tokenizer
from tests.ranks import run_ranks
from tests.recipes.test_clip import config_in, flat, outcome, train_once
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.losses.distill import soft_distillation
from trainer.recipe import Recipe, load_recipe
from trainer.run import context_of, loading_notes
from trainer.teachers.pair import FrozenPair, load_live_pair
from trainer.types import Batch

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def pair(folder: Path, make: Any = folders.clip, **pixels: Any) -> tuple[str, Any]:
    """A pair with its tokenizer and image processor, as people have them."""
    path, model = save(folder, make)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size, **pixels).save_pretrained(path)
    return path, model


def config_of(folder: Path, path: str, *overrides: str, **distill: Any) -> RunConfig:
    section = ", ".join(f"{key}: {value}" for key, value in {"model": path, **distill}.items())
    return config_in(
        folder,
        f"recipe.distill={{{section}}}",
        f"recipe.model.tokenizer={path}",
        *overrides,
    )


def built(config: RunConfig) -> Recipe:
    return load_recipe(config.recipe, context_of(config, Comm.solo(), word_tokenizer()))


def batch_of(size: int = 32, count: int = 5) -> Batch:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, size, size, generator=draw)
    tokens, mask = texts([1 + 2 * n for n in range(count)])
    return Batch(pixels, tokens, mask, torch.arange(count))


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize(
    "make", [folders.clip, folders.siglip, folders.chinese_clip, folders.dual_encoder]
)
def test_it_says_what_transformers_says_of_the_students_pixels_and_tokens(
    make: Any, tmp_path: Path
) -> None:
    path, model = pair(tmp_path / "pair", make)
    recipe, batch = built(config_of(tmp_path, path, rows_at_once=2)), batch_of()
    assert batch.token_mask is not None
    mask = None if make is folders.siglip else batch.token_mask.long()
    said = model.get_image_features(pixel_values=batch.images).pooler_output
    read = model.get_text_features(input_ids=batch.tokens, attention_mask=mask).pooler_output
    teacher: Any = recipe.parts["teacher"]
    for ours, theirs in zip(teacher.vectors(batch), (said, read), strict=True):
        torch.testing.assert_close(ours, normalize(theirs, dim=-1), rtol=1e-4, atol=1e-5)
    assert teacher.scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert built(config_of(tmp_path, path, logit_scale=7.0)).parts["teacher"].scale == 7.0


@torch.no_grad()
def test_another_size_and_normalisation_are_the_teachers_own(tmp_path: Path) -> None:
    """The student trains on 48 pixels with CLIP's mean; the teacher sees 32 with another one."""
    path, model = pair(tmp_path / "pair", **HALF)
    config = config_of(tmp_path, path, "recipe.model.image_size=48")
    batch, teacher = batch_of(48), built(config).parts["teacher"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    shown = batch.images * deviation + mean
    shown = interpolate(shown, (32, 32), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    wanted = model.get_image_features(pixel_values=shown).pooler_output
    found, _ = teacher.vectors(batch)
    torch.testing.assert_close(found, normalize(wanted, dim=-1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_is_near_and_nothing_of_the_pair_learns(tmp_path: Path) -> None:
    path, _ = pair(tmp_path / "pair")
    whole = load_live_pair(Path(path), word_tokenizer(), length=LENGTH)
    halves = load_live_pair(Path(path), word_tokenizer(), length=LENGTH, precision="bfloat16")
    assert isinstance(halves.model, FrozenPair)
    assert not any(value.requires_grad for value in halves.model.parameters())
    assert next(halves.model.parameters()).dtype == torch.bfloat16
    batch = batch_of()
    for one, two in zip(
        *(each.model(batch.images, batch.tokens, batch.token_mask) for each in (whole, halves)),
        strict=True,
    ):
        assert two.dtype == torch.float32
        assert (one * two).sum(dim=1).min() > 0.99


def test_the_loss_is_that_of_its_vectors_and_the_term_says_how_far_it_is(tmp_path: Path) -> None:
    path, _ = pair(tmp_path / "pair")
    recipe, batch = built(config_of(tmp_path, path, weight=2.0)), batch_of()
    features = recipe.model(batch)
    losses = recipe.losses(features, batch, 0)
    teacher: Any = recipe.parts["teacher"]
    expected = soft_distillation(
        *(features.image, features.text, features.logit_scale),
        *(*teacher.vectors(batch), teacher.scale, Comm.solo()),
    )
    assert losses["distill"].item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert losses.weights == {"clip": 1.0, "distill": 2.0, "distill_divergence": 0.0}
    assert losses["distill_divergence"].item() == pytest.approx(
        expected.loss.item() - expected.teacher_entropy.item(), abs=1e-5
    )
    notes = loading_notes(config_of(tmp_path, path), recipe)
    assert any("teacher: CLIPModel" in line and line.endswith(" s") for line in notes)


@pytest.mark.heavy
def test_a_run_does_not_go_on_with_another_pair(tmp_path: Path) -> None:
    path, model = pair(tmp_path / "pair")
    config = config_of(tmp_path, path)
    state = dict(built(config).parts["teacher"].state_share())
    built(config).parts["teacher"].load_state_dict(state)
    model.logit_scale.data.add_(0.1)
    model.save_pretrained(path)
    with pytest.raises(CheckpointError, match="teacher model are not those"):
        built(config).parts["teacher"].load_state_dict(state)


@pytest.mark.heavy
def test_mistakes_in_one_sentence(tmp_path: Path) -> None:
    path, _ = pair(tmp_path / "pair")
    bert, _ = save(tmp_path / "bert", TEXTS["bert"])
    bare, _ = save(tmp_path / "bare", folders.clip)
    other, _ = pair(tmp_path / "other")
    word_tokenizer(("[pad]", "[begin]", "[end]")).save_pretrained(other)
    stores = {"image_store": tmp_path / "image", "text_store": tmp_path / "text"}
    for config, said in (
        (config_of(tmp_path, bert), "is a BertModel and no pair of towers"),
        (config_of(tmp_path, bare), "lacks a preprocessor_config.json"),
        (config_of(tmp_path, other), "a tokenizer of its own.*set recipe.model.tokenizer="),
        (
            config_of(tmp_path, path, f"recipe.model.text_length={LENGTH + 1}"),
            f"set model.text_length={LENGTH}",
        ),
        (config_of(tmp_path, str(tmp_path / "nowhere")), "no model at .*nowhere"),
    ):
        with pytest.raises(TrainerError, match=said) as caught:
            built(config)
        assert "\n" not in str(caught.value)
    for distill, said in (
        (stores, "either `image_store` and `text_store`, or `model`"),
        ({"model": "null"}, "either `image_store` and `text_store`, or `model`"),
        ({"model": "null", **stores, "sharded": "true"}, "sharded is not read where model is null"),
        ({"model": "null", "image_store": tmp_path / "image"}, "either `image_store`"),
    ):
        with pytest.raises(ConfigError, match=said):
            config_of(tmp_path, path, **distill)
    with pytest.raises(ConfigError, match="weight is 0, so that no text would be learned from"):
        config_in(tmp_path, "recipe.distill=null", "recipe.weight=0")


def test_whole_on_one_rank_and_sharded_on_two_teach_the_same(tmp_path: Path) -> None:
    """ZeRO-1 with the pair whole; ZeRO-3 with the pair dealt to two ranks, three rows at a time."""
    path, _ = pair(tmp_path / "pair", **HALF)
    zero1 = "deepspeed=ds_configs/zero1.json"
    run_ranks(train_once, 1, config_of(tmp_path, path, zero1), timeout_seconds=300)
    workdir = f"workdir={tmp_path}/other"
    sharded = config_of(tmp_path, path, workdir, sharded="true", rows_at_once=3)
    run_ranks(train_once, 2, sharded, timeout_seconds=300)
    ours, theirs = outcome(tmp_path / "run"), outcome(tmp_path / "other")
    for name, value in ours[0].items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding, which Adam steps along
            torch.testing.assert_close(theirs[0][name], value, rtol=1e-4, atol=1e-4)
    assert not any("teacher" in name for name in ours[0])
    for one, two in zip(ours[1], theirs[1], strict=True):
        found, wanted = (flat(line) for line in (one, two))
        terms = [name for name in found if name.endswith(("distill", "divergence", "loss"))]
        assert any("divergence" in name for name in terms)
        for name in terms:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4)
