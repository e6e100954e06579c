"""Low-rank additions: what starts, what learns, and what is left when they are merged."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel

from tests.models.small import save_bert, save_llama, small_batch, small_config, word_tokenizer
from trainer.errors import ConfigError
from trainer.export.native import load_exported
from trainer.export.transformers_folder import export_model
from trainer.models.config import TowerConfig
from trainer.models.lora import has_lora, merge_lora
from trainer.models.two_tower import TwoTower, build_two_tower

SAVERS = {"llama": save_llama, "bert": save_bert}


def built(path: str, seed: int = 0, **lora: object) -> TwoTower:
    config = small_config(text={"path": path, "lora": lora})
    return build_two_tower(config, word_tokenizer(), seed=seed)


@pytest.mark.parametrize("kind", SAVERS)
def test_it_starts_as_the_loaded_model_and_only_the_additions_learn(
    kind: str, tmp_path: Path
) -> None:
    path = SAVERS[kind](tmp_path)
    plain = build_two_tower(small_config(text={"path": path}), word_tokenizer())
    model, batch = built(path), small_batch()
    torch.testing.assert_close(model(batch).text, plain(batch).text, rtol=0, atol=1e-6)
    learns = {n for n, p in model.text.named_parameters() if p.requires_grad}
    assert learns - {"projection.weight"}
    assert all("lora" in name for name in learns - {"projection.weight"})
    model(batch).text.sum().backward()
    assert all(p.grad is not None for n, p in model.text.named_parameters() if n in learns)
    assert model.parameter_depth(next(iter(n for n in learns if ".0." in n)).join(["text.", ""]))


def test_merged_additions_say_the_same_and_are_gone(tmp_path: Path) -> None:
    model, batch = built(save_llama(tmp_path)), small_batch()
    with torch.no_grad():
        for name, parameter in model.text.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = model(batch).text
    merged = copy.deepcopy(model)
    merge_lora(merged.text.backbone)
    assert not has_lora(merged)
    torch.testing.assert_close(merged(batch).text, expected, rtol=0, atol=1e-5)
    names = dict(merged.text.backbone.named_parameters()).keys()
    assert names == dict(AutoModel.from_pretrained(tmp_path).named_parameters()).keys()


@pytest.mark.heavy
def test_an_export_has_plain_towers_and_loads_again(tmp_path: Path) -> None:
    model, batch = built(save_llama(tmp_path / "llama"), layers=["q_proj"], rank=2), small_batch()
    with torch.no_grad():
        model.text.backbone.layers[0].self_attn.q_proj.lora_B["default"].weight.normal_(std=0.1)
    export_model(model, word_tokenizer(), tmp_path / "out")
    assert has_lora(model)
    again, _ = load_exported(tmp_path / "out")
    torch.testing.assert_close(again(batch).text, model(batch).text, rtol=0, atol=1e-6)
    text = AutoModel.from_pretrained(tmp_path / "out" / "text")
    moved = model.text.backbone.layers[0].self_attn.q_proj
    expected = moved.base_layer.weight + moved.get_delta_weight("default")
    torch.testing.assert_close(text.layers[0].self_attn.q_proj.weight, expected)


def test_the_start_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = save_llama(tmp_path)
    first, again, other = built(path).state_dict(), built(path).state_dict(), built(path, seed=1)
    (name, *_) = [n for n in first if "lora_A" in n]
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other.state_dict()[name])


def test_mistakes_are_refused(tmp_path: Path) -> None:
    for values in ({"lora": {}}, {"path": "x", "trained": False, "lora": {}}):
        with pytest.raises(ValidationError, match="set path and trained"):
            TowerConfig.model_validate(values)
    with pytest.raises(
        ConfigError, match=r"lora.layers has no_such_layer, but .* LlamaModel are down_proj, "
    ):
        built(save_llama(tmp_path), layers=["no_such_layer"])
