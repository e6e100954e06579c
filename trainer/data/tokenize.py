"""Text to token ids: a byte-level BPE of our own, or any tokenizer that transformers loads.

Ours treats text as CLIP does (canonical Unicode form, lower case, white space collapsed) but has
no unknown token: every byte is in the vocabulary, so any language comes back as it went in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Int64
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.errors import ConfigError

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|padding|>"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+"
"""Merges stay within a word, a digit, or a run of marks; the space before belongs to it."""


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, length: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that writes BOS and EOS by itself and truncates to `length` keeping EOS.

    The vocabulary holds 256 bytes and three special tokens at least, and may stay smaller than
    `vocab_size` where the captions give no more pairs. A pure function of the captions' counts.
    """
    smallest = 256 + 3
    if vocab_size < smallest:
        raise ConfigError(f"vocabulary of {vocab_size} is below 256 bytes + 3 special = {smallest}")
    tokenizer = _untrained()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS],  # transformers reads an EOS id of 2 as an old file
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=length,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """A saved tokenizer, from a folder or a name in the local cache; given a pad token if needed.

    Where a tokenizer has no pad token its EOS fills the rows; the mask says which is which. Texts
    lose their end and rows are filled up behind, whichever sides the tokenizer was saved with:
    `sides_of` says them. ConfigError where it has types of tokens, which no model here is given.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a plain Exception is what tokenizers says
        raise ConfigError(f"no tokenizer at {path}: {_said(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"{path} has no fast tokenizer (tokenizer.json); save it once with transformers where "
            "the packages that it needs are installed"
        )
    _refuse_made_up(tokenizer, path)
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    _refuse_types(tokenizer, path)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer {path} has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def sides_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """From which sides the saved tokenizer cuts and fills, where it says so; here, the right."""
    said = {key: tokenizer.init_kwargs.get(key) for key in ("truncation_side", "padding_side")}
    return {key: str(value) for key, value in said.items() if value is not None}


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides the ids of a text, as it was loaded."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # of the latest call
    special = {key: str(value) for key, value in sorted(tokenizer.special_tokens_map.items())}
    said = [backend, special, sides_of(tokenizer)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _refuse_made_up(tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """ConfigError for a folder without a vocabulary: transformers makes one up there, of special
    tokens alone, by which all texts are the same."""
    wanted = sorted({"tokenizer.json", *type(tokenizer).vocab_files_names.values()})
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in wanted):
        raise ConfigError(
            f"no tokenizer at {path}: it has none of {', '.join(wanted)}; save the model's "
            "tokenizer into it"
        )


def _refuse_types(tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    try:
        types = tokenizer("a b", return_token_type_ids=True).get("token_type_ids") or []
    except Exception as error:  # a plain Exception is what tokenizers says
        raise ConfigError(
            f"the tokenizer {path} can't read a text ({_said(error)}); save the one that its "
            "model was trained with"
        ) from error
    if any(types):
        raise ConfigError(
            f"the tokenizer {path} gives a text the token types {sorted(set(types))}, but models "
            "are given none, which means 0; change the template in its tokenizer.json"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path | str) -> None:
    """Write the folder that `load_tokenizer` and `AutoTokenizer` read.

    How the latest call truncated is not part of it.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(str(path))


def tokenize(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int
) -> tuple[Int64[Tensor, "batch {length}"], Bool[Tensor, "batch {length}"]]:
    """Token ids, filled up on the right to `length`, and a mask that is True on real tokens.

    Longer texts lose their end, but not the special tokens that the tokenizer adds there.
    """
    return pad_ids(token_ids(tokenizer, texts, length=length), tokenizer.pad_token_id, length)


def token_ids(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int
) -> list[list[int]]:
    """The ids of every text, special tokens included, at most `length` of them."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts),
        padding=False,
        truncation=True,
        max_length=length,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=True,  # "<|endoftext|>" in a caption is text
    )["input_ids"]
    return ids


def pad_ids(
    rows: Sequence[Sequence[int]], pad: int, length: int
) -> tuple[Int64[Tensor, "batch {length}"], Bool[Tensor, "batch {length}"]]:
    """Rows of at most `length` ids, filled up on the right, and the mask of the real ones."""
    tokens = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return tokens, mask


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
