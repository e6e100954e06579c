"""Tiny random models with word tokenizers, saved as transformers saves them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from tests.fixtures.emoji import read_pairs

CAPTIONS = [record["name"] for record in read_pairs(60)]
DIM = 32
SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def save_tokenizer(path: Path, *, frame: str, words: list[str]) -> int:
    """Words in the order given behind the special ones; the size of the vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    table = {word: row for row, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(frame, None, ends)
    begin = {"bos_token": "[CLS]"} if frame == "[CLS] $A" else {"cls_token": "[CLS]"}
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        sep_token="[SEP]",
        **begin,
    ).save_pretrained(path)
    return len(table)


def words() -> list[str]:
    prompt = 'this image description : means in just one word after " . , category of main object'
    return sorted({word for text in [*CAPTIONS, prompt] for word in text.lower().split()})


def save_bert(path: Path) -> Path:
    size = save_tokenizer(path, frame="[CLS] $A [SEP]", words=words())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=DIM,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(path)
    return path


def save_llama(path: Path) -> Path:
    size = save_tokenizer(path, frame="[CLS] $A", words=words())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def save_t5(path: Path) -> Path:
    size = save_tokenizer(path, frame="$A [SEP]", words=words())
    torch.manual_seed(0)
    config = T5Config(vocab_size=size, d_model=DIM, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    T5Model(config).save_pretrained(path)
    return path


def save_vit(path: Path) -> Path:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SMALL_VIT, initializer_range=0.2)).save_pretrained(path)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path
