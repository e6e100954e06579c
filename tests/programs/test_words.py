"""The page and the figures of a run of LexVLA, and the small language model that it begins with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.recipes.test_clip import config_in as clip_in
from tests.recipes.test_lexvla import config_in, train_once
from trainer.data.tokenize import load_tokenizer
from trainer.errors import ConfigError, DataError
from trainer.pictures.words_page import ImageCard, Said, WordCard, with_heat, words_page
from trainer.programs.language_model import ModelSize, words_of, write_language_model
from trainer.programs.words import words_of_run

HOSTILE = '<script>alert("x")</script>'


def test_a_run_tells_its_words_and_other_runs_are_refused(tmp_path: Path) -> None:
    run = config_in(tmp_path, "steps=1")
    other = clip_in(tmp_path / "clip", "steps=1", "deepspeed=ds_configs/zero0.json")
    run_ranks(train_once, 1, run, other, timeout_seconds=300)
    path, figures = words_of_run(run.workdir, shown=3)
    page = path.read_text()
    assert figures["words"] > 2
    assert figures["the best that a grid of patches can"] == 1.0
    assert 0 <= figures["index: share of the dense first 10"] <= 1
    assert 0 < figures["index: share of the dense products"] < 1
    assert page.count("<section>") >= 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    with pytest.raises(ConfigError, match="stand over no words"):
        words_of_run(other.workdir)


def test_captions_and_words_are_escaped(tmp_path: Path) -> None:
    pixels, heat = np.full((16, 16, 3), 200, np.uint8), np.eye(4, dtype=np.float32)
    said = [Said(HOSTILE, 0.5, True, heat), Said("b", 0.1, False)]
    path = words_page(
        tmp_path / "words.html",
        [ImageCard(pixels, HOSTILE, said)],
        [WordCard(HOSTILE, [(pixels, HOSTILE, heat)])],
        title=HOSTILE,
        figures={HOSTILE: HOSTILE},
    )
    page = path.read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7
    assert "default-src 'none'" in page


def test_a_map_is_red_where_a_word_is_loud_and_flat_ones_change_nothing() -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    assert np.array_equal(with_heat(pixels, heat), pixels)
    heat[0, 3] = 2
    mixed = with_heat(pixels, heat).astype(int)
    assert mixed[1, 30, 1] < 110 < 195 < mixed[1, 30, 0]
    assert np.array_equal(mixed[20, 5], pixels[20, 5])


@pytest.mark.heavy
def test_a_small_language_model_learns_and_is_one_that_lexvla_takes(tmp_path: Path) -> None:
    spec = write_shards(tmp_path / "shards", count=24, per_shard=12)
    size = ModelSize(width=16, vocabulary=400, steps=60, batch=16, learning_rate=0.02)
    loss = write_language_model(spec, tmp_path / "lm", size)
    assert loss < 0.8 * np.log(400)
    assert write_language_model(spec, tmp_path / "again", size) == loss
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert model.get_output_embeddings().weight.shape == (400, 16)
    assert torch.isfinite(model.get_output_embeddings().weight).all()
    assert len(load_tokenizer(str(tmp_path / "lm"))) == 400
    assert words_of("Red Fox", ["a big cat", 7, "fox"]) == ("red", "fox", "big", "cat")
    with pytest.raises(DataError, match="has a caption"):
        write_language_model(blank(tmp_path), tmp_path / "none", size)


def blank(folder: Path) -> str:
    """Shards of images without captions."""
    from tests.recipes.test_mlcd import shards_without_captions

    (folder / "blank").mkdir()
    return shards_without_captions(folder / "blank")
