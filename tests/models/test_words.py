"""Words of other people's language models: whose rows, whose tokenizers, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from trainer.data.tokenize import load_tokenizer, train_tokenizer
from trainer.errors import ConfigError
from trainer.models.words import beside_rows, chosen_words, output_rows

TEXTS = ["a red fox in the snow", "the fox sleeps", "snow on red leaves, again"] * 4
SPECIALS = ["<pad>", "<unk>", "</s>"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"num_key_value_heads": 1, **SIZES}
LANGUAGE_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "llama in halves": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).half(),
    "qwen2, tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2)
    ),
    "opt, narrow words": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **{**SIZES, "hidden_size": 32, "ffn_dim": 24, "do_layer_norm_before": False},
            word_embed_proj_dim=16,
        )
    ),
    "gpt neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_rows_are_what_the_model_multiplies_its_states_with(kind: str, tmp_path: Path) -> None:
    """In several files, in the precision of the file, tied to the input's embedding or not."""
    model = LANGUAGE_MODELS[kind]().eval()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    rows = output_rows(str(tmp_path))
    assert rows.dtype == next(model.parameters()).dtype
    tokens = torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        states = model.float().base_model(tokens).last_hidden_state
        torch.testing.assert_close(states @ rows.float().T, model(tokens).logits)
    assert beside_rows(str(tmp_path)) == ""


def test_what_scores_a_word_besides_its_row_is_told(tmp_path: Path) -> None:
    for name, model, said in (
        ("phi", hf.PhiForCausalLM(hf.PhiConfig(**SIZES)), "a bias"),
        (
            "gemma2",
            hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
            "final_logit_softcapping=3.0",
        ),
        (
            "granite",
            hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=7.0)),
            "logits_scaling=7.0",
        ),
    ):
        model.save_pretrained(tmp_path / name)
        assert beside_rows(str(tmp_path / name)) == f"; left out of its words' scores: {said}"


def _of(model: Any, pre: Any, decoder: Any, trainer: Any, normalizer: Any = None) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if trainer is not None:
        tokenizer.train_from_iterator(TEXTS, trainer)
    names = dict(zip(("pad_token", "unk_token", "eos_token"), SPECIALS, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level() -> Any:
    return train_tokenizer(TEXTS, vocab_size=320, length=20)


def with_added_tokens() -> Any:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<image>", "helloworld"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def byte_fallback() -> Any:
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    back = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip()]
    )
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=330, special_tokens=pieces, show_progress=False)
    split = pre_tokenizers.Split(Regex("▁"), behavior="merged_with_next")
    return _of(models.BPE(byte_fallback=True, unk_token="<unk>"), split, back, trainer, space)


def unigram() -> Any:
    words = sorted({word for text in TEXTS for word in re.findall(r"\w+", text)})
    pieces = [*SPECIALS, *(f"▁{word}" for word in words), *"abcdefghijklmnopqrstuvwxyz▁,"]
    model = models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], 1)
    return _of(model, pre_tokenizers.Metaspace(), decoders.Metaspace(), None)


def word_pieces() -> Any:
    trainer = WordPieceTrainer(vocab_size=80, special_tokens=SPECIALS, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    return _of(model, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), trainer)


def ends_of_words() -> Any:
    trainer = BpeTrainer(
        vocab_size=80, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return _of(model, pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(), trainer)


@pytest.mark.parametrize(
    "make",
    [byte_level, with_added_tokens, byte_fallback, unigram, word_pieces, ends_of_words],
)
def test_words_are_whole_or_begin_one_whoever_made_the_tokenizer(make: Any, tmp_path: Path) -> None:
    """Neither bytes, marks, special and added tokens, nor what only goes on with a word."""
    make().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    ids = chosen_words(tokenizer, "words", count=len(tokenizer) + 64).tolist()
    tokens = tokenizer.convert_ids_to_tokens(ids)
    words = {tokenizer.convert_tokens_to_string([token]).strip() for token in tokens}
    text = " ".join(TEXTS)
    assert {"fox", "red", "snow"} <= words
    for word in words:
        assert f" {word}" in f" {text}" or make is ends_of_words, word
    if make is ends_of_words:
        assert all(token.endswith("</w>") for token in tokens)
    assert not words & {"helloworld", "image"}
    assert not set(ids) & set(tokenizer.all_special_ids)
    small = chosen_words(tokenizer, "words", count=max(ids))
    assert small.tolist() == ids[:-1], "a model has no rows for later ones"


def test_a_tokenizer_that_reads_no_text_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="can't read a text"):
        load_tokenizer(str(tmp_path))
