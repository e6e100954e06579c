"""Any folder becomes a tower that says what transformers says, or is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.models import folders
from tests.models.folders import IMAGES, OWN_VECTOR, TEXTS, save
from tests.models.small import LENGTH, small_config, texts, word_tokenizer
from trainer.errors import ConfigError
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.models.load import model_pixels
from trainer.models.two_tower import TwoTower, build_two_tower

PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def image_tower(path: str, *, size: int = 32, dim: int = 24, **section: Any) -> ImageTower:
    values = {"image": {"path": path, **section}, "embed_dim": dim, "image_size": size}
    return build_image_tower(ImageTowerConfig.model_validate(values))


def text_model(path: str, *, length: int = LENGTH, dim: int = 24, **section: Any) -> TwoTower:
    config = small_config(text={"path": path, **section}, text_length=length, embed_dim=dim)
    return build_two_tower(config, word_tokenizer())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_tower_says_what_the_model_says_in_every_pass(kind: str, tmp_path: Path) -> None:
    path, model = save(tmp_path, IMAGES[kind])
    tower = image_tower(path).image.train()
    with torch.no_grad():
        expected = tower.projection(OWN_VECTOR[kind](model(pixel_values=PIXELS)))
    close(tower.images(PIXELS), expected)
    assert torch.equal(tower.images(PIXELS), tower.images(PIXELS))
    tower.images(PIXELS).sum().backward()
    assert [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []
    assert type(model).__name__ in tower.note


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["dinov2", "dinov2 with registers", "dinov3"])
@pytest.mark.parametrize("size", [40, 64])
def test_models_that_interpolate_positions_see_other_sizes(
    kind: str, size: int, tmp_path: Path
) -> None:
    path, model = save(tmp_path, IMAGES[kind])
    tower = image_tower(path, size=size).image
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        close(tower.images(pixels), tower.projection(model(pixel_values=pixels).pooler_output))
    with pytest.raises(ConfigError, match=r"patches of 8; set model.image_size=40 or 48"):
        image_tower(path, size=44)


@pytest.mark.parametrize("kind", ["siglip", "swin", "convnext"])
def test_a_model_without_a_class_token_has_no_cls(kind: str, tmp_path: Path) -> None:
    path, model = save(tmp_path, IMAGES[kind])
    with pytest.raises(ConfigError, match="has no class token; use auto or mean"):
        image_tower(path, pooling="cls")
    tower = image_tower(path, pooling="mean").image
    with torch.no_grad():
        states = model(pixel_values=PIXELS).last_hidden_state
    states = states.flatten(2).mT if states.dim() == 4 else states
    close(tower.images(PIXELS), tower.projection(states.mean(dim=1)))
    tower.images(PIXELS).sum().backward()
    assert [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_tower_saved_with_its_projection_keeps_it(tmp_path: Path) -> None:
    settings = hf.CLIPVisionConfig(**folders.SQUARE, projection_dim=16)
    path, model = save(tmp_path, lambda: hf.CLIPVisionModelWithProjection(settings))
    with torch.no_grad():
        close(image_tower(path, dim=16).image.images(PIXELS), model(PIXELS).image_embeds)
    with pytest.raises(ConfigError, match=r"set model.embed_dim=16, or model.image.projection=new"):
        image_tower(path)
    assert image_tower(path, projection="new").image.projection.out_features == 24


# -- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_tower_pools_the_states_of_each_text_alone(kind: str, tmp_path: Path) -> None:
    path, model = save(tmp_path, TEXTS[kind])
    encoder = model.get_encoder() if kind == "t5" else model
    tower = text_model(path).text.train()
    tokens, mask = texts([1, 5, 10, 3])
    found = tower.texts(tokens, mask)
    causal = kind in ("llama", "qwen", "gemma")
    assert tower.pool == ("last" if causal else "mean")
    for row in range(4):
        alone = tokens[row : row + 1, : int(mask[row].sum())]
        with torch.no_grad():
            states = encoder(input_ids=alone).last_hidden_state[0]
            close(found[row], tower.projection(states[-1] if causal else states.mean(dim=0)))
    assert torch.equal(tower.texts(tokens, mask), found)
    found.sum().backward()
    assert [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "modernbert", "llama"])
def test_a_row_longer_than_the_model_reads_is_refused_with_the_longest(
    kind: str, tmp_path: Path
) -> None:
    path, model = save(tmp_path, TEXTS[kind])
    spare = {"roberta": 1, "mpnet": 2}.get(kind, 0)  # positions that are padding's alone
    assert model.config.max_position_embeddings == LENGTH + spare
    with pytest.raises(ConfigError, match=f"set model.text_length={LENGTH}"):
        text_model(path, length=LENGTH + 2)
    text_model(path, length=LENGTH)


def test_a_sentence_folder_says_how_its_texts_are_pooled(tmp_path: Path) -> None:
    path, model = save(tmp_path, TEXTS["bert"])
    steps = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(steps))
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling/config.json"
    pooling.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    tower, (tokens, mask) = text_model(path).text, texts([4, 4])
    with torch.no_grad():
        states = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        close(tower.texts(tokens, mask), tower.projection(states[:, 0]))
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ConfigError, match="pools by max_tokens"):
        text_model(path)
    (tmp_path / "modules.json").write_text(json.dumps([*steps, {"type": "x.LSTM", "path": "2"}]))
    with pytest.raises(ConfigError, match="a step LSTM"):
        text_model(path)


def vectors(found: Any) -> torch.Tensor:
    """Some classes return them bare."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output


# -- pairs --------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("make", "dim"),
    [
        (folders.clip, 24),
        (folders.siglip, 32),
        (folders.chinese_clip, 24),
        (folders.dual_encoder, 24),
        (folders.blip, 24),
    ],
)
def test_a_pair_keeps_its_features_its_scale_and_its_bias(
    make: Any, dim: int, tmp_path: Path
) -> None:
    path, pair = save(tmp_path, make)
    towers = {"image": {"path": path}, "text": {"path": path}, "embed_dim": dim}
    model = build_two_tower(small_config(**towers, bias=True), word_tokenizer())
    tokens, mask = texts([1, 5, 10, 3])
    with torch.no_grad():
        images = vectors(pair.get_image_features(pixel_values=PIXELS))
        hidden = None if make is folders.siglip else mask.long()
        words = vectors(pair.get_text_features(input_ids=tokens, attention_mask=hidden))
        close(model.image.images(PIXELS), images)
        close(model.text.texts(tokens, mask), words)
    assert model.logit_scale().item() == pytest.approx(pair.logit_scale.exp().item(), rel=1e-6)
    bias = -7.0 if make is folders.siglip else -10.0
    assert model.logit_bias is not None
    assert model.logit_bias().item() == bias
    given = small_config(**towers, logit_scale_init=5.0)
    assert build_two_tower(given, word_tokenizer()).logit_scale().item() == pytest.approx(5.0)


def test_a_pair_whose_scale_is_out_of_reach_is_refused(tmp_path: Path) -> None:
    path, pair = save(tmp_path, folders.clip)
    pair.logit_scale.data.fill_(4.8)
    pair.save_pretrained(path)
    config = small_config(image={"path": path}, text={"path": path})
    with pytest.raises(ConfigError, match=r"starts at 121.5, .* set model.scale_max=122"):
        build_two_tower(config, word_tokenizer())


def test_a_pair_with_broken_weights_is_refused(tmp_path: Path) -> None:
    path, pair = save(tmp_path, folders.clip)
    pair.visual_projection.weight.data[0, 0] = torch.nan
    pair.save_pretrained(path)
    towers = {"image": {"path": path}, "text": {"path": path}, "embed_dim": 24}
    with pytest.raises(ConfigError, match="no numbers; its weights are bad"):
        build_two_tower(small_config(**towers), word_tokenizer())


def test_siglip_texts_are_rows_of_its_own_length(tmp_path: Path) -> None:
    path, _ = save(tmp_path, folders.siglip)
    with pytest.raises(ConfigError, match=f"filled up to {LENGTH} tokens"):
        text_model(path, length=LENGTH - 2, dim=32)


def test_an_end_token_that_is_not_the_models_is_noticed(tmp_path: Path) -> None:
    path, pair = save(tmp_path, folders.clip)
    pair.config.text_config.eos_token_id = 40
    pair.config.save_pretrained(path)
    with pytest.raises(ConfigError, match="is its end token the tokenizer's"):
        text_model(path)


# -- refusals -----------------------------------------------------------------------------------


def refused(says: str, path: Path, part: str = "image", **section: Any) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        image_tower(str(path), **section) if part == "image" else text_model(str(path), **section)
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
def test_what_can_be_no_tower_is_refused_in_a_sentence(tmp_path: Path) -> None:
    save(tmp_path / "naflex", folders.siglip2_naflex)
    refused("use a checkpoint of one fixed resolution", tmp_path / "naflex")
    save(tmp_path / "mae", lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**folders.SQUARE)))
    refused("answers the same image differently each time", tmp_path / "mae")
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    save(tmp_path / "resnet", lambda: hf.ResNetModel(hf.ResNetConfig(**small)))
    refused("has batch norms", tmp_path / "resnet")
    image_tower(str(tmp_path / "resnet"), trained=False)
    save(tmp_path / "bert", TEXTS["bert"])
    refused("can't read images", tmp_path / "bert")
    save(tmp_path / "vit", IMAGES["vit"])
    refused("reads no texts", tmp_path / "vit", "text")
    refused("set model.image_size=32", tmp_path / "vit", size=48)
    refused("no config.json", tmp_path)


def test_weights_that_would_be_made_up_are_refused(tmp_path: Path) -> None:
    path, _ = save(tmp_path, IMAGES["siglip"])
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if ".head.probe" not in name}
    kept.pop("head.probe", None)
    save_file(kept, file, metadata={"format": "pt"})
    refused("lacks 1 tensors .* as head.probe", tmp_path)
    assert path == str(tmp_path)


def test_a_folder_of_pickles_says_how_to_convert(tmp_path: Path) -> None:
    _, model = save(tmp_path, TEXTS["bert"])
    (tmp_path / "model.safetensors").unlink()
    refused("no safetensors with weights", tmp_path, "text")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    refused("a pickle, which is not read; where you trust it, convert it", tmp_path, "text")


# -- hub ids ------------------------------------------------------------------------------------


def test_a_hub_id_is_followed_in_all_that_its_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels and pooling stand beside the model, in the hub's cache; nothing is asked for there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, make in (("vision", IMAGES["vit"]), ("words", TEXTS["bert"])):
        stored = tmp_path / f"models--someone--{name}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs/main").write_text("a" * 40)
        save(stored / "snapshots" / ("a" * 40), make)
    found = {
        name: next((tmp_path / f"models--someone--{name}/snapshots").iterdir())
        for name in ("vision", "words")
    }
    size = {"height": 32, "width": 32}
    ViTImageProcessorPil(size=size, image_mean=[0.1] * 3, resample=2).save_pretrained(
        found["vision"]
    )
    steps = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (found["words"] / "modules.json").write_text(json.dumps(steps))
    (found["words"] / "1_Pooling").mkdir()
    (found["words"] / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    values = {"image": {"path": "someone/vision"}, "embed_dim": 24, "image_size": 32}
    config = ImageTowerConfig.model_validate(values)
    assert model_pixels(config).mean == (0.1, 0.1, 0.1)
    assert build_image_tower(config).image.pool == "cls"
    assert text_model("someone/words").text.pool == "cls"
    with pytest.raises(ConfigError, match=r"can't load a .* from someone/nothing"):
        image_tower("someone/nothing")
