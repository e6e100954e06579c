"""Captions of a real, small model: its own texts, the same on any number of ranks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertLMHeadModel,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tests.curation.corpus import BAD, SIZES, write_corpus
from tests.curation.test_scan import files_of
from tests.models.small import word_tokenizer
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.curation.captioner import FolderCaptioner, write_captions
from trainer.data.generated import GeneratedCaptions
from trainer.data.selection import write_selection
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An image encoder with a text decoder, as transformers saves one; never trained."""
    torch.manual_seed(0)
    tokenizer, sizes = word_tokenizer(), {"hidden_size": 32, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 48}
    decoder = BertConfig(
        vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True, **sizes
    )
    encoder = ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes))
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(decoder))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # what is seen outweighs what was said
            torch.nn.init.normal_(parameter, std=3.0 if "crossattention" in name else 0.3)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    begin = tokenizer.bos_token_id
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = begin
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    path = tmp_path_factory.mktemp("captioner")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def captions(comm: Comm, spec: str, folder: Path, out: Path, select: Path | None) -> None:
    captioner = FolderCaptioner(folder, comm.device, most_tokens=6, beams=1, rows=4)
    write_captions(spec, out, captioner, comm, select=select)


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("captions") / "data")


@pytest.mark.heavy
def test_a_caption_is_what_the_model_itself_generates_of_the_image(spec, folder, tmp_path):
    captions(Comm.solo(), spec, folder, tmp_path / "out", None)
    found, shards = GeneratedCaptions(tmp_path / "out"), ShardSet.open(spec)
    unreadable = sum(reason != "no caption" for reason in BAD.values())
    assert found.header.captions == sum(SIZES) - unreadable
    model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    tokenizer, processor = word_tokenizer(), ViTImageProcessor.from_pretrained(folder)
    texts = set()
    for index in (0, 4, 9, 13, 15):
        sample = shards.read(index)
        image = Image.open(io.BytesIO(sample.fields["png"]))
        pixels = processor(image, return_tensors="pt").pixel_values
        ids = model.generate(pixel_values=pixels, max_new_tokens=6, do_sample=False)
        (text,) = tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts.add(text)
        assert found.of(sample.sample_id) == " ".join(text.split())
    assert len(texts) > 1
    assert found.of(int(shards.ids[2])) is None


def test_two_ranks_write_the_same_bytes_and_a_selection_limits_the_work(spec, folder, tmp_path):
    shards = ShardSet.open(spec)
    chosen = {name: np.ones(n) for name, n in zip(shards.names, shards.sizes, strict=True)}
    chosen["000"] = np.zeros(7)
    select = tmp_path / "selection"
    write_selection(select, shards, chosen, {})
    captions(Comm.solo(), spec, folder, tmp_path / "one", select)
    run_ranks(captions, 2, spec, folder, tmp_path / "two", select)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    found = GeneratedCaptions(tmp_path / "one")
    assert found.of(int(shards.ids[0])) is None
    assert found.of(int(shards.ids[7])) is not None
    with pytest.raises(DataError, match="written by another model"):
        captions(Comm.solo(), spec, folder, tmp_path / "one", None)


def test_a_folder_without_such_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no model that turns images into text"):
        FolderCaptioner(tmp_path, torch.device("cpu"), most_tokens=6, beams=1, rows=4)
