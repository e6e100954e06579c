"""Towers that came from SigLIP go back to it: SiglipModel, or apart with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from tests.models.folders import ROWS, SIZES, SQUARE, save
from tests.models.small import small_config, word_tokenizer
from trainer.data.tokenize import tokenize
from trainer.export.native import load_exported
from trainer.export.transformers_folder import export_model
from trainer.models.two_tower import TwoTower, build_two_tower
from trainer.types import Batch

LENGTH = 64
"""Of rows: what transformers' pipeline fills SigLIP's up to."""
NAMES = ["word3 word1", "word7", " ".join(["word9"] * 80)]


def pair() -> Any:
    text = {**SIZES, **ROWS, "max_position_embeddings": LENGTH, "projection_size": 32}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=SQUARE))
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.5)
    return model


def trained(folder: Path, **changes: Any) -> TwoTower:
    """Towers of the folder after some steps: every number differs from what was loaded."""
    path, _ = save(folder, pair)
    towers = {"image": {"path": path}, "text": {"path": path}}
    config = small_config(**{**towers, "embed_dim": 32, "text_length": LENGTH, **changes})
    model = build_two_tower(config, word_tokenizer()).eval()
    chosen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=chosen) * 0.02)
    return model


def picture(folder: Path) -> Image.Image:
    values = np.random.default_rng(4).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    image.save(folder / "picture.png")
    return image


def batch_of(model: TwoTower, pixels: torch.Tensor) -> Batch:
    tokens, mask = tokenize(word_tokenizer(), NAMES, length=LENGTH)
    return Batch(pixels, tokens, mask, torch.arange(len(pixels)))


@pytest.mark.heavy
@torch.no_grad()
def test_a_trained_siglip_is_transformers_own_again(tmp_path: Path) -> None:
    """Embeddings, logits with scale and bias, and the probabilities of the pipeline."""
    model = trained(tmp_path / "first", bias=True)
    exported = export_model(model, word_tokenizer(), tmp_path / "out")
    assert (exported.is_whole, exported.loads_as) == (True, "SiglipModel")
    assert "SiglipModel adds" in exported.beside
    image = picture(tmp_path / "out")
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
    given = processor(
        text=NAMES, images=image, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert set(given) == {"input_ids", "pixel_values"}
    assert given["input_ids"].shape == (3, LENGTH)
    theirs = hf.SiglipModel.from_pretrained(tmp_path / "out").eval()(**given)
    ours = model(batch_of(model, given["pixel_values"]))
    assert ours.logit_bias is not None
    torch.testing.assert_close(theirs.image_embeds, ours.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.text_embeds, ours.text, rtol=0, atol=1e-5)
    logits = ours.logit_scale * ours.image @ ours.text.T + ours.logit_bias
    torch.testing.assert_close(theirs.logits_per_image, logits, rtol=1e-5, atol=1e-5)
    ask = hf.pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    scores = {row["label"]: row["score"] for row in ask(image, candidate_labels=NAMES[:2])}
    tokens, mask = tokenize(
        word_tokenizer(), [f"This is a photo of {name}." for name in NAMES[:2]], length=LENGTH
    )
    ours = model(Batch(given["pixel_values"], tokens, mask, torch.arange(1)))
    wanted = torch.sigmoid(ours.logit_scale * ours.image @ ours.text.T + ours.logit_bias)[0]
    assert [scores[name] for name in NAMES[:2]] == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.heavy
@torch.no_grad()
def test_what_was_exported_is_loaded_and_trained_on_as_it_was(tmp_path: Path) -> None:
    model = trained(tmp_path / "first", bias=True)
    export_model(model, word_tokenizer(), tmp_path / "out")
    (tmp_path / "first").rename(tmp_path / "gone")
    batch = batch_of(model, torch.rand(3, 3, 32, 32))
    expected = model(batch)
    again, _ = load_exported(tmp_path / "out")
    for before, after in zip(expected, again(batch), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)
    path = {"path": str(tmp_path / "out")}
    config = small_config(image=path, text=path, embed_dim=32, text_length=LENGTH, bias=True)
    found = build_two_tower(config, word_tokenizer()).eval()(batch)
    for name in ("image", "text", "logit_scale", "logit_bias"):
        torch.testing.assert_close(found.tensor(name), expected.tensor(name), rtol=0, atol=1e-5)


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "trained with a softmax and no bias"),
        ({"bias": True, "embed_dim": 24, "projection": "new"}, "image tower has a projection"),
        ({"bias": True, "pooling": "mean"}, "image tower pools by mean"),
    ],
)
def test_what_siglip_has_no_place_for_is_written_as_towers_apart(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    """Each of them is what the class that the card names loads, its own head where that is read."""
    sections = {k: changes[k] for k in ("projection", "pooling") if k in changes}
    path = str(tmp_path / "first")
    own = {"image": {"path": path, **sections}, "text": {"path": path, **sections}}
    rest = {k: v for k, v in changes.items() if k not in sections}
    model = trained(tmp_path / "first", **own, **rest)
    exported = export_model(model, word_tokenizer(), tmp_path / "out")
    assert (exported.is_whole, exported.loads_as) == (False, "towers apart")
    assert why in exported.why_apart
    assert (
        f"`SiglipModel` can't load it: {exported.why_apart}"
        in (tmp_path / "out/README.md").read_text()
    )
    pixels = torch.rand(3, 3, 32, 32)
    batch = batch_of(model, pixels)
    vision = hf.SiglipVisionModel.from_pretrained(tmp_path / "out/image").eval()(
        pixel_values=pixels
    )
    words = hf.SiglipTextModel.from_pretrained(tmp_path / "out/text").eval()(input_ids=batch.tokens)
    assert batch.tokens is not None
    assert batch.token_mask is not None
    if "pooling" not in changes:
        for said, tower, rows in (
            (vision.pooler_output, model.image, model.image.images(pixels)),
            (words.pooler_output, model.text, model.text.texts(batch.tokens, batch.token_mask)),
        ):
            torch.testing.assert_close(tower.projection(said), rows, rtol=0, atol=1e-5)
    expected = model(batch)
    again, _ = load_exported(tmp_path / "out")
    assert torch.equal(again(batch).image, expected.image)
    assert torch.equal(again(batch).text, expected.text)


def test_the_code_of_the_card_runs_offline_in_a_bare_process(tmp_path: Path) -> None:
    model = trained(tmp_path / "first", bias=True)
    export_model(model, word_tokenizer(), tmp_path / "out")
    picture(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "softmax" not in card
    assert "times the cosine, plus a bias of" in card
    result = subprocess.run(
        [sys.executable, "-c", card.split("```python\n")[1].split("```")[0]],
        cwd=tmp_path / "out",
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "tensor([[" in result.stdout
