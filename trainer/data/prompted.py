"""A template around every text, as part of the tokenizer: it is wherever a run reads text."""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from trainer.errors import ConfigError

LEAST_TEXT = 4
"""Tokens that a template must leave to the text."""


def with_template(
    tokenizer: PreTrainedTokenizerFast, template: str, *, length: int
) -> PreTrainedTokenizerFast:
    """The tokenizer, in place, with what stands before and behind the `{}` of `template`.

    It takes the place of the special tokens that were added, but for the begin token of one that
    writes it. A text that is too long loses its own end, never the template's. A ConfigError where
    `length` tokens leave the text fewer than four.
    """
    if template.count("{}") != 1:
        raise ConfigError(f"the prompt {template!r} must have the text's place, {{}}, once")
    before, behind = (_ids(tokenizer, part) for part in template.split("{}"))
    if _begins(tokenizer):
        before = [tokenizer.bos_token_id, *before]
    needed = len(before) + len(behind) + LEAST_TEXT
    if length < needed:
        raise ConfigError(
            f"the prompt takes {needed - LEAST_TEXT} of text_length={length} tokens; set "
            f"model.text_length to {needed} at least, and rather to {needed + 60}"
        )
    # The names stand for several ids each; names of the vocabulary would be looked up there.
    pieces = {"[prompt begins]": before, "[prompt ends]": behind}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["[prompt begins]", "$A", "[prompt ends]"],
        pair=None,
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in pieces.items()
        ],
    )
    return tokenizer


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _begins(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer writes its begin token before a text."""
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
