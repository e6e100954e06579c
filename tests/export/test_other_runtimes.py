"""open_clip and onnxruntime load what was exported and give the trainer's embeddings to 1e-5."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.test_transformers_folder import moved_model
from tests.models.small import small_config, word_tokenizer
from trainer.errors import CheckpointError, ConfigError
from trainer.export.equality import compare_forms, probe
from trainer.export.onnx_files import save_onnx
from trainer.export.transformers_folder import export_model
from trainer.models.config import ImageTowerConfig
from trainer.models.image_tower import build_image_tower

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def open_clip() -> Any:
    for package in ("torchvision", "open_clip"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return pytest.importorskip("open_clip")


@pytest.fixture
def onnxruntime() -> Any:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.mark.parametrize("sigmoid", [False, True])
@torch.no_grad()
def test_open_clip_gives_the_same_embeddings_tokens_and_logits(
    tmp_path: Path, open_clip: Any, sigmoid: bool
) -> None:
    """The end token is not the largest id here, which is where open_clip would look by itself."""
    model, tokenizer = moved_model(bias=sigmoid), word_tokenizer()
    export_model(model, tokenizer, tmp_path, open_clip=True)
    forms = {
        each.form: each for each in compare_forms(model, tokenizer, tmp_path, loads_as="CLIPModel")
    }
    assert max(forms["open_clip"].furthest.values()) < 1e-5
    assert max(forms["transformers CLIPModel"].furthest.values()) < 1e-5
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    batch = probe(model, tokenizer)
    said = theirs(batch.images, batch.tokens)
    assert float(said[2]) == pytest.approx(float(model.logit_scale()), rel=1e-6)
    if sigmoid:
        assert model.logit_bias is not None
        assert float(said[3]) == pytest.approx(float(model.logit_bias()), rel=1e-6)
    words = ["word3 word1", "word7 " * 40]
    ours = tokenizer(
        words,
        padding="max_length",
        truncation=True,
        max_length=model.config.text_length,
        return_tensors="pt",
    )
    read = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(words)
    assert torch.equal(read, ours["input_ids"])


def test_onnx_graphs_give_the_same_embeddings_for_any_number_of_rows(
    tmp_path: Path, onnxruntime: Any
) -> None:
    model, tokenizer = moved_model(), word_tokenizer()
    export_model(model, tokenizer, tmp_path, onnx=True)
    forms = {
        each.form: each for each in compare_forms(model, tokenizer, tmp_path, loads_as="CLIPModel")
    }
    assert forms["onnxruntime"].furthest.keys() == {"image", "text"}
    assert max(forms["onnxruntime"].furthest.values()) < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "image.onnx"))
    pixels = torch.randn(5, 3, 32, 32)
    [rows] = session.run(None, {"pixels": pixels.numpy()})
    with torch.no_grad():
        truth = torch.nn.functional.normalize(model.image.images(pixels), dim=1)
    torch.testing.assert_close(torch.from_numpy(rows), truth, rtol=0, atol=1e-5)


def test_an_image_tower_alone_becomes_one_graph(tmp_path: Path, onnxruntime: Any) -> None:
    config = small_config()
    model = build_image_tower(
        ImageTowerConfig(
            image_size=32, patch_size=16, embed_dim=24, image=config.image.model_dump()
        )
    ).eval()
    export_model(model, None, tmp_path, onnx=True)
    kind = "CLIPVisionModelWithProjection"
    found = compare_forms(model, None, tmp_path, loads_as=kind)
    assert [each.form for each in found] == [f"transformers {kind}", "native", "onnxruntime"]
    for each in found:
        assert each.furthest.keys() == {"image"}
        assert each.furthest["image"] < 1e-5


def test_an_export_that_is_not_equal_is_refused(tmp_path: Path) -> None:
    """The comparison finds a single number that was changed by little."""
    model, tokenizer = moved_model(), word_tokenizer()
    export_model(model, tokenizer, tmp_path)
    with torch.no_grad():
        model.text.projection.weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match="do not use it"):
        compare_forms(model, tokenizer, tmp_path, loads_as="CLIPModel")


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    found = importlib.util.find_spec

    def lacking(name: str, *rest: Any) -> Any:
        return None if name in ("onnx", "onnxscript") else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript"):
        save_onnx(moved_model(), tmp_path)
