"""Towers that wait in the precision of their files are, to the bit, those loaded in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaModel

from tests.models.small import save_llama, small_batch, small_config, word_tokenizer
from trainer.checkpoint.run_state import frozen_digest
from trainer.models.stored import is_as_stored, towers_as_stored, widened
from trainer.models.two_tower import TwoTower, build_two_tower

MODES: dict[str, dict[str, Any]] = {
    "whole": {"pooling": "mean"},
    "frozen": {"trained": False, "pooling": "last"},
    "additions": {"pooling": "last", "lora": {"rank": 4}},
}


def half_llama(folder: Path) -> str:
    path = save_llama(folder)
    LlamaModel.from_pretrained(path).bfloat16().save_pretrained(path)
    return path


def model_of(path: str, mode: str, *, as_stored: bool) -> TwoTower:
    config = small_config(text={"path": path, **MODES[mode]}, embed_dim=16)
    with towers_as_stored(as_stored):
        return build_two_tower(config, word_tokenizer(), seed=3)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_model_waits_in_half_the_bytes(tmp_path: Path, mode: str) -> None:
    path = half_llama(tmp_path)
    plain, waiting = (model_of(path, mode, as_stored=flag) for flag in (False, True))
    assert is_as_stored(waiting)
    assert not is_as_stored(plain)
    in_blocks = [p for n, p in waiting.named_parameters() if ".layers." in n and "lora" not in n]
    text = [p for p in in_blocks if p.dtype == torch.bfloat16]
    assert len(text) == sum(1 for _ in plain.text.backbone.layers.parameters()) - (
        sum("lora" in n for n, _ in plain.text.backbone.named_parameters())
    )
    assert frozen_digest(waiting) == frozen_digest(plain)
    with torch.no_grad():
        for one, other in zip(
            plain(small_batch(3)).tensors().values(),
            waiting(small_batch(3)).tensors().values(),
            strict=True,
        ):
            assert torch.equal(one, other)
    assert waiting.text.note.split(";")[0] == plain.text.note.split(";")[0]
    assert json.dumps(waiting.text.backbone.config.to_dict(), default=str) == json.dumps(
        plain.text.backbone.config.to_dict(), default=str
    )
    for _ in widened(waiting):
        pass
    assert not is_as_stored(waiting)
    expected = dict(plain.named_parameters())
    for name, value in waiting.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
        assert value.requires_grad == expected[name].requires_grad, name


def test_files_of_two_precisions_are_loaded_in_float32(tmp_path: Path) -> None:
    path = save_llama(tmp_path)
    model = LlamaModel.from_pretrained(path).bfloat16()
    model.norm.float()
    model.save_pretrained(path)
    assert not is_as_stored(model_of(path, "whole", as_stored=True))
    LlamaModel.from_pretrained(path, dtype=torch.float32).save_pretrained(path)
    assert not is_as_stored(model_of(path, "whole", as_stored=True))
