"""Any folder becomes a teacher whose vectors are transformers' own, or is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.models import folders
from tests.models.folders import IMAGES, OWN_VECTOR, TEXTS, save
from tests.models.small import LENGTH
from trainer.errors import ConfigError
from trainer.teachers.image import ImageTeacher
from trainer.teachers.spec import TeacherSpec, load_teacher
from trainer.teachers.text import TextTeacher

PAIRS = {
    "clip": folders.clip,
    "siglip pair": folders.siglip,
    "chinese clip": folders.chinese_clip,
}
SAID = ["word1 word2 word3", "word7", "word3 word9 word11 word4 word5"]


def text_teacher(path: str, **changes: Any) -> TextTeacher:
    teacher = load_teacher(TeacherSpec(model=path, unit_norm=False, **changes))
    assert isinstance(teacher, TextTeacher)
    return teacher


def image_teacher(path: str, **changes: Any) -> ImageTeacher:
    teacher = load_teacher(TeacherSpec(model=path, kind="image", unit_norm=False, **changes))
    assert isinstance(teacher, ImageTeacher)
    return teacher


def own_text(kind: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What transformers gives of one text alone."""
    if kind == "siglip pair":  # rows of one length, and no mask, as it was trained
        filled = pad(ids, (0, LENGTH - ids.shape[1]), value=0)
        return model.get_text_features(input_ids=filled).pooler_output[0]
    if kind in PAIRS:
        hidden = torch.ones_like(ids)
        return model.get_text_features(input_ids=ids, attention_mask=hidden).pooler_output[0]
    encoder = model.get_encoder() if kind == "t5" else model
    return encoder(input_ids=ids).last_hidden_state[0].mean(dim=0)


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("kind", [*TEXTS, *PAIRS])
def test_text_vectors_are_the_models_own(kind: str, tmp_path: Path) -> None:
    path, model = save(tmp_path, {**TEXTS, **PAIRS}[kind])
    teacher = text_teacher(path)
    for text, found in zip(SAID, teacher.encode_texts(SAID)[:, 0], strict=True):
        ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
        torch.testing.assert_close(found, own_text(kind, model, ids), rtol=1e-4, atol=1e-5)
    assert type(model).__name__.removesuffix("Model")[:4] in teacher.note
    teacher.encode_texts([" ".join(SAID * 40)])  # cut to what the model reads


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("kind", [*IMAGES, *PAIRS])
def test_image_vectors_are_the_models_own(kind: str, tmp_path: Path) -> None:
    path, model = save(tmp_path, {**IMAGES, **PAIRS}[kind])
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    teacher = image_teacher(path)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - 0.5) / 0.5
    own = (
        model.get_image_features(pixel_values=pixels).pooler_output
        if kind in PAIRS
        else OWN_VECTOR[kind](model(pixel_values=pixels))
    )
    torch.testing.assert_close(teacher.encode(list(images))[:, 0], own, rtol=1e-4, atol=1e-5)


def sentence_folder(folder: Path, **pooling: bool) -> Any:
    path, model = save(folder, TEXTS["bert"])
    kinds = {"0": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    steps = [{"type": f"x.{kind}", "path": "" if p == "0" else p} for p, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(steps))
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
    modes = {f"pooling_mode_{name}": on for name, on in pooling.items()}
    (folder / "1_Pooling/config.json").write_text(json.dumps(modes))
    dense = {"in_features": 32, "out_features": 5, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"  # type: ignore[assignment]
    (folder / "2_Dense/config.json").write_text(json.dumps(dense))
    weights = {"linear.weight": torch.randn(5, 32), "linear.bias": torch.randn(5)}
    save_file(weights, folder / "2_Dense/model.safetensors")
    words = {"prompts": {"query": "word5 ", "document": "word6 "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(words))
    return path, model, weights


@pytest.mark.heavy
@torch.no_grad()
def test_a_sentence_folder_is_followed_in_all_it_says(tmp_path: Path) -> None:
    path, model, weights = sentence_folder(tmp_path, cls_token=True, mean_tokens=False)
    teacher = text_teacher(path)
    ids = torch.tensor([teacher.tokenizer("word5 word1 word2")["input_ids"]])
    state = model(input_ids=ids).last_hidden_state[:, 0]
    own = torch.tanh(state @ weights["linear.weight"].T + weights["linear.bias"])
    found = teacher.encode_texts(["word1 word2"])[:, 0]
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    assert teacher.identity.dim == 5
    assert "2_Dense" in teacher.note
    assert "document are not used" in teacher.note
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    assert text_teacher(path).length == 7
    assert "though its 1_Pooling says cls" in text_teacher(path, pooling="mean").note
    (tmp_path / "2_Dense/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        text_teacher(path)


@pytest.mark.heavy
def test_every_loaded_setting_is_part_of_the_identity(tmp_path: Path) -> None:
    path, _ = save(tmp_path, TEXTS["bert"])
    before = text_teacher(path).identity

    def changed(file: str, **values: Any) -> bool:
        kept = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps({**json.loads(kept), **values}))
        identity = text_teacher(path).identity
        (tmp_path / file).write_text(kept)
        return identity != before and identity.settings != before.settings

    assert changed("config.json", num_attention_heads=2)
    assert changed("config.json", layer_norm_eps=1e-3)
    assert changed("tokenizer_config.json", truncation_side="left")
    assert not changed("config.json", transformers_version="4.0.0")
    assert text_teacher(path).identity == before


def test_a_length_that_the_model_can_not_read_is_refused(tmp_path: Path) -> None:
    path, _ = save(tmp_path, TEXTS["roberta"])
    with pytest.raises(ConfigError, match=f"set length={LENGTH} or less"):
        text_teacher(path, length=LENGTH + 1)
    assert text_teacher(path).length == LENGTH


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("siglip", {"pooling": "cls"}, "has no class token"),
        ("vit", {"pooling": "projected"}, "pools nothing by itself"),
        ("vit", {"image_size": 48}, "image_size=32"),
        ("siglip", {"pooling": "projected", "layer": 1}, "leave out layer"),
    ],
)
def test_an_image_teacher_that_can_not_be_is_refused(
    kind: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path, _ = save(tmp_path, IMAGES[kind])
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=says):
        image_teacher(path, **changes)


def test_a_folder_for_the_other_kind_is_refused(tmp_path: Path) -> None:
    path, _ = save(tmp_path, TEXTS["bert"])
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="can't read images"):
        image_teacher(path)


@pytest.mark.heavy
def test_words_behind_a_long_caption_are_never_cut(tmp_path: Path) -> None:
    path, _ = save(tmp_path / "llm", TEXTS["llama"])
    readings = [{"template": "word1 {} word2 word3"}]
    file = tmp_path / "end.yaml"
    file.write_text(json.dumps({"name": "end", "readings": readings}))
    teacher = text_teacher(path, prompts=str(file), pooling="last", length=8)
    long, short = teacher.encode_texts(["word9 " * 40, "word9 word9 word9"])
    torch.testing.assert_close(long, short)
    with pytest.raises(ConfigError, match="has 5 tokens by itself, but length is 4"):
        text_teacher(path, prompts=str(file), pooling="last", length=4).encode_texts(["word9"])
