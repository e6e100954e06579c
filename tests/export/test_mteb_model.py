"""mteb's encoder interface over an exported folder gives the trainer's own embeddings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export.test_transformers_folder import moved_model
from tests.models.small import word_tokenizer
from trainer.data.tokenize import tokenize
from trainer.errors import ConfigError
from trainer.export.mteb_model import MtebModel
from trainer.export.transformers_folder import export_model
from trainer.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_model(moved_model(), word_tokenizer(), tmp_path / "mine")
    return tmp_path / "mine"


def pictures(count: int) -> list[Image.Image]:
    values = np.random.default_rng(4).integers(0, 256, (count, 40, 32, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in values]


def test_rows_are_the_trainers_and_pairs_are_their_sum(folder: Path) -> None:
    model, ours = MtebModel(folder), moved_model()
    images, texts = pictures(3), ["word4 word5", "word6", "word7 " * 40]
    tokens, mask = tokenize(word_tokenizer(), texts, length=ours.config.text_length)
    pixels = torch.stack(
        [model._pixels.arranged(image) for image in images]  # RGB: no file has to be decoded
        if model._pixels.fit != "centre"
        else [_centre(image) for image in images]
    )
    with torch.no_grad():
        truth = ours(Batch(model._pixels.normalized(pixels), tokens, mask, torch.arange(3)))
    assert truth.image is not None
    assert truth.text is not None
    found = model.encode([{"image": images[:2]}, {"image": images[2:]}])
    torch.testing.assert_close(found, truth.image, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode([{"text": texts}]), truth.text, rtol=0, atol=1e-5)
    both = torch.nn.functional.normalize(truth.image + truth.text, dim=1)
    torch.testing.assert_close(
        model.encode([{"image": images, "text": texts}]), both, rtol=0, atol=1e-5
    )
    cosines = truth.image @ truth.text.T
    said = model.similarity(truth.image.numpy(), truth.text)
    torch.testing.assert_close(said, cosines, rtol=0, atol=1e-5)
    paired = model.similarity_pairwise(truth.image, truth.text)
    torch.testing.assert_close(paired, cosines.diagonal(), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="this task has audio"):
        model.encode([{"audio": [0]}])


def _centre(image: Image.Image) -> torch.Tensor:
    """32 x 40 pixels, of which the middle 32 are seen."""
    return torch.from_numpy(np.array(image.crop((0, 4, 32, 36)))).permute(2, 0, 1)


def test_mteb_takes_it_for_an_encoder(folder: Path) -> None:
    pytest.importorskip("mteb", reason="mteb is not installed")
    from mteb.models.models_protocols import EncoderProtocol

    model = MtebModel(folder)
    assert isinstance(model, EncoderProtocol)
    assert model.mteb_model_meta.name == "protoscale/mine"
    assert model.mteb_model_meta.modalities == ["image", "text"]


def test_without_the_package_one_sentence_names_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    with pytest.raises(ConfigError, match="pip install mteb"):
        _ = MtebModel(folder).mteb_model_meta
