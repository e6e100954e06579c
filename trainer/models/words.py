"""The words that a causal language model can say: rows of its output embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.errors import ConfigError
from trainer.models.folder import RAISED, first_line, folder_settings
from trainer.models.pools import is_causal_kind

BEGINS = ("Ġ", "▁")
"""How byte-level and sentencepiece tokenizers write the space before a word."""
ENDS = "</w>"
"""How others write the end of one, who mark no beginnings."""
_OF_SCORES = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings by which some models bound or scale what they say next."""
Vocabulary = Literal["words", "all"]


def output_rows(path: str) -> Float[Tensor, "tokens dim"]:
    """The rows that score the next token at `path`, a folder or a name in the local cache.

    In the precision in which they were saved. The whole model is in memory until this returns. A
    ConfigError where it is no causal language model, or was saved without these rows.
    """
    settings = folder_settings(path)
    if not is_causal_kind(settings):
        raise ConfigError(
            f"{path} is a {settings.model_type} model, which says no next word; lexical vectors "
            "need a causal language model"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except RAISED as error:
        raise ConfigError(f"{path} can't be loaded: {first_line(error)}") from error
    model, report = loaded
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    if f"{name}.weight" in report["missing_keys"]:
        raise ConfigError(
            f"{path} was saved without its output embedding ({name}), so it has no words to say; "
            "save it as a causal language model"
        )
    rows: Tensor = head.weight.detach().clone()
    return rows


def beside_rows(path: str) -> str:
    """What the model at `path` scores a token by besides its row, for people; empty if nothing."""
    settings = folder_settings(path)
    with torch.device("meta"):
        head: Any = AutoModelForCausalLM.from_config(settings).get_output_embeddings()
    found = ["a bias"] if getattr(head, "bias", None) is not None else []
    for name in _OF_SCORES:
        if getattr(settings, name, None) not in (None, 1, 1.0):
            found.append(f"{name}={getattr(settings, name)}")
    return f"; left out of its words' scores: {', '.join(found)}" if found else ""


def chosen_words(
    tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary | Path, *, count: int
) -> Int64[Tensor, " words"]:
    """Ids below `count`, in ascending order.

    `words`: those that begin a word and consist of two letters or more, in any script; of a
    tokenizer that marks the ends of words only, those that end one; of one that marks neither, all
    that are letters. `all`: everything but special tokens. A path: a text file with one id a line.
    LexVLA's own list is not published; this rule is ours.
    """
    if isinstance(vocabulary, Path):
        return _listed(vocabulary, count)
    special = set(tokenizer.all_special_ids)
    ids = [i for i in range(min(count, len(tokenizer))) if i not in special]
    if vocabulary == "words":
        tokens = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
        marked = _is_marked(tokens.values())
        ids = [i for i, token in tokens.items() if marked(token) and _is_word(tokenizer, token)]
    if len(ids) < 2:
        raise ConfigError(
            f"the tokenizer has {len(ids)} words by the rule of `vocabulary: words`; use `all`, or "
            "a file of ids"
        )
    return torch.tensor(ids, dtype=torch.int64)


def _is_marked(tokens: Iterable[str]) -> Callable[[str], bool]:
    """Whether a token is marked as a word, in the way in which some of these tokens are."""
    for mark in (lambda token: token.startswith(BEGINS), lambda token: token.endswith(ENDS)):
        if any(map(mark, tokens)):
            return mark
    return lambda token: True


def _is_word(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    text = tokenizer.convert_tokens_to_string([token]).strip()
    return len(text) > 1 and text.isalpha()


def _listed(path: Path, count: int) -> Tensor:
    try:
        ids = [int(line) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no list of ids, one a line: {error}") from error
    if len(set(ids)) != len(ids) or len(ids) < 2:
        raise ConfigError(f"{path} has {len(set(ids))} different ids in {len(ids)} lines")
    if min(ids) < 0 or max(ids) >= count:
        raise ConfigError(f"{path} names id {max(ids)}, but the model has {count} tokens")
    return torch.tensor(sorted(ids), dtype=torch.int64)
