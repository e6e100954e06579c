"""Small tokenizers, saved text models and batches for tests of towers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trainer.models.two_tower import TwoTowerConfig
from trainer.types import Batch

WORDS = [f"word{index}" for index in range(61)]
LENGTH = 12


def word_tokenizer(
    specials: tuple[str, str, str] = ("[pad]", "[end]", "[begin]"),
) -> PreTrainedTokenizerFast:
    """One id per word, the special tokens first; writes begin and end itself."""
    vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[begin] $A [end]",
        special_tokens=[(name, vocabulary[name]) for name in ("[begin]", "[end]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[begin]",
        eos_token="[end]",
        pad_token="[pad]",
        model_max_length=LENGTH,
        padding_side="right",
    )


def texts(lengths: list[int], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows with the given numbers of words, and their mask."""
    chosen = torch.Generator().manual_seed(seed)
    rows = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=chosen).tolist())
        for n in lengths
    ]
    encoded = word_tokenizer()(rows, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return encoded["input_ids"], encoded["attention_mask"].bool()


def small_config(**changes: object) -> TwoTowerConfig:
    """Two blocks of width 32 a tower, 32 pixels."""
    sizes = {"width": 32, "layers": 2, "heads": 2}
    values: dict[str, object] = {
        "image": sizes,
        "text": sizes,
        "embed_dim": 24,
        "image_size": 32,
        "patch_size": 16,
        "text_length": LENGTH,
    }
    values |= changes
    image = values["image"]
    if isinstance(image, dict) and "path" in image and "patch_size" not in changes:
        del values["patch_size"]  # the loaded model's
    return TwoTowerConfig.model_validate(values)


def small_batch(count: int = 4, *, seed: int = 0) -> Batch:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    tokens, mask = texts([1 + index % 9 for index in range(count)], seed=seed)
    return Batch(pixels, tokens, mask, torch.arange(count))


def save_llama(folder: Path) -> str:
    """A random causal language model."""
    settings = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return _save(LlamaModel, settings, folder)


def save_bert(folder: Path) -> str:
    """A random encoder, made with the dropout that such models have."""
    settings = BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return _save(BertModel, settings, folder)


def _save(kind: type[PreTrainedModel], settings: PretrainedConfig, folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(settings)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)
