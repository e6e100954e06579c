"""A very small causal language model of a corpus's own words, for a first run of LexVLA.

It reads `words of "fireworks":` and goes on with the caption's words and the sample's keywords, in
any order. Behind the prompt it therefore says all of them about equally: what LexVLA asks of a
language model that has read everything. A real one takes its place by a path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.data.decode import BadSample
from trainer.data.fields import json_of, text_of
from trainer.data.prompted import with_template
from trainer.data.shards import ShardSet
from trainer.data.tokenize import (
    load_tokenizer,
    pad_ids,
    save_tokenizer,
    token_ids,
    train_tokenizer,
)
from trainer.errors import DataError
from trainer.hashing import key_of

PROMPT = 'words of "{}":'
"""What `recipe.prompt` of a run must say."""
LENGTH = 96
"""Tokens of prompt, text and words at most."""
UNCOUNTED = -100


class Entry(NamedTuple):
    """A caption, and the words that go with it."""

    caption: str
    words: tuple[str, ...]


class ModelSize(NamedTuple):
    """Of the model, and how it learns."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    vocabulary: int = 3000
    steps: int = 240
    batch: int = 32
    learning_rate: float = 1e-2


def write_language_model(spec: str, out: Path, size: ModelSize, *, seed: int = 0) -> float:
    """Train on the captions and keywords of the shards `spec`, write a folder that transformers
    loads, and return the last loss in nats a word's token."""
    entries = read_entries(spec)
    tokenizer = train_tokenizer(
        [f"{PROMPT.format(e.caption)} {' '.join(e.words)}" for e in entries],
        vocab_size=size.vocabulary,
        length=LENGTH,
    )
    save_tokenizer(tokenizer, out)
    model = _untrained(tokenizer, size, seed)
    loss = _trained(model, tokenizer, _prompts(entries, out), entries, size, seed)
    model.save_pretrained(out)
    return loss


def read_entries(spec: str) -> list[Entry]:
    """DataError where no sample has a caption."""
    shards, found = ShardSet.open(spec), []
    for row in range(len(shards)):
        fields = shards.read(row).fields
        with suppress(BadSample):
            if caption := text_of(fields, "txt"):
                found.append(Entry(caption, words_of(caption, json_of(fields).get("keywords"))))
    if not found:
        raise DataError(f"no sample of {spec} has a caption (txt), so there is nothing to learn")
    return found


def words_of(caption: str, keywords: object) -> tuple[str, ...]:
    """Different words of two letters or more, of the caption first."""
    phrases: Iterable[object] = keywords if isinstance(keywords, list) else ()
    words = " ".join([caption, *map(str, phrases)]).lower().split()
    return tuple(dict.fromkeys(word for word in words if len(word) > 1 and word.isalpha()))


def _untrained(tokenizer: PreTrainedTokenizerFast, size: ModelSize, seed: int) -> LlamaForCausalLM:
    settings = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,  # what stands in a text is copied at once
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, "language model"))
        return LlamaForCausalLM(settings)


def _prompts(entries: Sequence[Entry], folder: Path) -> list[list[int]]:
    """As a run of lexvla reads its texts."""
    prompted = with_template(load_tokenizer(str(folder)), PROMPT, length=LENGTH)
    return token_ids(prompted, [entry.caption for entry in entries], length=LENGTH // 2)


def _trained(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    entries: Sequence[Entry],
    size: ModelSize,
    seed: int,
) -> float:
    generator = torch.Generator().manual_seed(key_of(seed, "order of words"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps)
    last = float("nan")
    for step in range(size.steps):
        rows = torch.randint(len(entries), (size.batch,), generator=generator).tolist()
        loss = model(**_batch(tokenizer, prompts, entries, rows, generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step + 1 == size.steps:
            last = float(loss.detach())
            sys.stderr.write(f"step {step + 1}/{size.steps}  loss {last:.3f}\n")
    return last


def _batch(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    entries: Sequence[Entry],
    rows: Sequence[int],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Prompts and shuffled words; only the words are learnt."""
    said, told = [], []
    for row in rows:
        words = entries[row].words
        order = torch.randperm(len(words), generator=generator).tolist()
        text = "".join(f" {words[place]}" for place in order)
        ids = tokenizer(f".{text}", add_special_tokens=False)["input_ids"][1:]
        whole = [*prompts[row], *ids][:LENGTH]
        said.append(whole)
        told.append([UNCOUNTED] * len(prompts[row]) + whole[len(prompts[row]) :])
    longest = max(map(len, said))
    tokens, mask = pad_ids(said, tokenizer.pad_token_id, longest)
    labels, _ = pad_ids([row[:longest] for row in told], UNCOUNTED, longest)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}
