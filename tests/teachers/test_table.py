"""The rows of docs/teachers.md that no other test holds: towers alone, half pairs, odd folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.models import folders
from tests.models.folders import ROWS, SIZES, SQUARE, TEXTS, WORDS, save
from tests.models.small import LENGTH, word_tokenizer
from tests.models.test_folders import close, image_tower, text_model
from tests.teachers.test_folders import image_teacher, text_teacher
from trainer.errors import ConfigError

PIXELS = torch.randint(
    0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
)
SAID = ["word1 word2 word3", "word7"]
CLIP_TEXT = {**SIZES, **ROWS, "projection_dim": 24}
HALVES = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
BART = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in HALVES.items()}

ALONE: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]] = {
    "clip text": (
        lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)),
        lambda output: output.pooler_output,
    ),
    "clip text with projection": (
        lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**CLIP_TEXT)),
        lambda output: output.text_embeds,
    ),
    "siglip text": (
        lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**CLIP_TEXT, projection_size=32)),
        lambda output: output.pooler_output,
    ),
}
"""Text towers of pairs, saved by themselves, and what they say of a text."""


def small_resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return hf.ResNetModel(hf.ResNetConfig(**sizes))


def with_pixels(folder: Path) -> None:
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("kind", ALONE)
def test_a_text_tower_alone_says_its_own_as_tower_and_as_teacher(kind: str, tmp_path: Path) -> None:
    make, own = ALONE[kind]
    path, model = save(tmp_path, make)
    teacher = text_teacher(path)
    ids = word_tokenizer()(SAID, padding="max_length", max_length=LENGTH, return_tensors="pt")
    mask = None if kind == "siglip text" else ids["attention_mask"]
    wanted = own(model(input_ids=ids["input_ids"], attention_mask=mask))
    close(teacher.encode_texts(SAID)[:, 0], wanted)
    tower = text_model(path, dim=wanted.shape[1]).text
    found = tower.texts(ids["input_ids"], ids["attention_mask"].bool())
    close(found, wanted if "projection" in kind else tower.projection(wanted))


@pytest.mark.heavy
@torch.no_grad()
def test_a_vision_tower_saved_with_its_projection_teaches_its_embedding(tmp_path: Path) -> None:
    settings = hf.CLIPVisionConfig(**SQUARE, projection_dim=16)
    path, model = save(tmp_path, lambda: hf.CLIPVisionModelWithProjection(settings))
    with_pixels(tmp_path)
    teacher = image_teacher(path)
    own = model(pixel_values=(PIXELS / 255 - 0.5) / 0.5).image_embeds
    close(teacher.encode(list(PIXELS))[:, 0], own)


@pytest.mark.heavy
@torch.no_grad()
def test_batch_norm_teaches_and_stays_frozen_with_its_own_statistics(tmp_path: Path) -> None:
    path, model = save(tmp_path, small_resnet)
    with_pixels(tmp_path)
    pixels = (PIXELS / 255 - 0.5) / 0.5
    own = model(pixel_values=pixels).pooler_output.flatten(1)
    close(image_teacher(path).encode(list(PIXELS))[:, 0], own)
    tower = image_tower(path, trained=False).image.train()
    close(tower.images(pixels), tower.projection(own))
    close(tower.images(pixels), tower.projection(own))


def test_naflex_teaches_no_images(tmp_path: Path) -> None:
    path, _ = save(tmp_path, folders.siglip2_naflex)
    with_pixels(tmp_path)
    with pytest.raises(ConfigError, match="use a checkpoint of one fixed resolution"):
        image_teacher(path)


@pytest.mark.parametrize("kind", TEXTS)
def test_a_folder_without_a_tokenizer_is_given_none(kind: str, tmp_path: Path) -> None:
    """transformers makes one of special tokens alone for some, and all texts are the same then."""
    TEXTS[kind]().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer at") as caught:
        text_teacher(str(tmp_path))
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_an_encoder_decoder_teaches_its_encoders_states(tmp_path: Path) -> None:
    sizes = {**BART, "d_model": 16, "max_position_embeddings": LENGTH, **WORDS}
    path, model = save(tmp_path, lambda: hf.BartModel(hf.BartConfig(**sizes)))
    teacher = text_teacher(path)
    for text, found in zip(SAID, teacher.encode_texts(SAID)[:, 0], strict=True):
        ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
        close(found, model.get_encoder()(input_ids=ids).last_hidden_state[0].mean(dim=0))
    with pytest.raises(ConfigError, match="is an encoder-decoder; a tower is one of the two"):
        text_model(path)


def test_a_random_order_of_patches_teaches_nothing(tmp_path: Path) -> None:
    path, _ = save(tmp_path, lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SQUARE)))
    with_pixels(tmp_path)
    with pytest.raises(ConfigError, match="answers the same image differently each time"):
        image_teacher(path)


@pytest.mark.heavy
@torch.no_grad()
@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "lasttoken"])
def test_a_sentence_folder_pools_as_it_says(mode: str, tmp_path: Path) -> None:
    """In both spellings of the file, with a step that only normalises behind it."""
    path, model = save(tmp_path, TEXTS["bert"])
    sentence_folder(tmp_path)
    for values in ({f"pooling_mode_{mode}": True}, {"pooling_mode": mode.removesuffix("_tokens")}):
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(values))
        teacher = text_teacher(path)
        for text, found in zip(SAID, teacher.encode_texts(SAID)[:, 0], strict=True):
            ids = torch.tensor([teacher.tokenizer(text)["input_ids"]])
            states = model(input_ids=ids).last_hidden_state[0]
            own = {"cls_token": states[0], "lasttoken": states[-1]}.get(mode, states.mean(dim=0))
            close(found, own)


def sentence_folder(folder: Path) -> None:
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"path": place, "type": f"sentence.{kind}"} for place, kind in steps]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()


def test_what_a_tower_does_not_carry_on_is_refused_by_name(tmp_path: Path) -> None:
    path, _ = save(tmp_path, TEXTS["bert"])
    sentence_folder(tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    words = {"prompts": {"query": "word5 "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="puts 'word5 ' before every text, which a tower does"):
        text_model(path)
    (tmp_path / "config_sentence_transformers.json").unlink()
    steps = json.loads((tmp_path / "modules.json").read_text())
    steps.append({"path": "3_Dense", "type": "sentence.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(ConfigError, match=r"has maps behind its pooling \(3_Dense\)"):
        text_model(path)


def test_folders_without_what_is_needed_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """As teachers of texts: pickles, code of its own, no tokenizer, no model at all."""
    path, model = save(tmp_path / "bert", TEXTS["bert"])
    cases: list[tuple[str, str]] = [(str(tmp_path / "nowhere"), "no model at")]
    settings = json.loads((tmp_path / "bert/config.json").read_text())
    own = {**settings, "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    for name, values in (("code", own), ("bin", settings), ("bare", settings)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    word_tokenizer().save_pretrained(tmp_path / "code")
    word_tokenizer().save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin/pytorch_model.bin")
    model.save_pretrained(tmp_path / "bare")
    cases += [
        (str(tmp_path / "code"), "transformers can't load a model from"),
        (str(tmp_path / "bin"), "a pickle, which is not read; where you trust it, convert it"),
        (str(tmp_path / "bare"), "no tokenizer at|has no fast tokenizer"),
    ]
    for folder, said in cases:
        with pytest.raises(ConfigError, match=said) as caught:
            text_teacher(folder)
        assert "\n" not in str(caught.value)
    assert text_teacher(path).note.endswith(" s")
