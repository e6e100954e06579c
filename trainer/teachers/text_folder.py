"""A frozen model of texts from a folder: what it pools, how long its rows are, what it says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from trainer.data.corpus.wheels import sha256_of
from trainer.data.tokenize import load_tokenizer, tokenizer_digest
from trainer.errors import ConfigError
from trainer.models.folder import Loaded, load_folder
from trainer.models.folder_tower import own_text_tower, said_otherwise
from trainer.models.inspection import Reach, inspect_text
from trainer.models.sentence_folder import (
    SentenceFolder,
    load_maps,
    read_sentence_folder,
    width_of,
)
from trainer.teachers.frozen import TORCH_DTYPES, Shard
from trainer.teachers.on_disk import placed, settings_of, took, weights_hash
from trainer.teachers.own_vectors import OwnVectors
from trainer.teachers.prompts import PromptSet, load_prompts
from trainer.teachers.section import TeacherSpec, refuse_placement
from trainer.teachers.text import TextTeacher
from trainer.teachers.universal import KIND as UNIVERSAL
from trainer.teachers.universal import load_universal

DEFAULT_LENGTH = 256


def text_teacher(
    spec: TeacherSpec, folder: Path, name: str, device: torch.device | str, shard: Shard | None
) -> TextTeacher:
    prompts = load_prompts(spec.prompts)
    prompts = prompts.with_fields(spec.fields) if spec.fields else prompts
    if json.loads((folder / "config.json").read_text()).get("model_type") == UNIVERSAL:
        refuse_placement(spec, name)
        tokenizer = load_tokenizer(str(folder))
        return TextTeacher(
            load_universal(folder).to(device),
            tokenizer,
            prompts,
            name=name,
            hashes=(weights_hash(folder), _tokenizer_hash(folder, tokenizer)),
            pooling="own",
            length=spec.length or DEFAULT_LENGTH,
            unit_norm=spec.unit_norm,
            batch_tokens=spec.batch_tokens,
            settings=tokenizer_digest(tokenizer),
        )
    return _sentence_teacher(spec, folder, name, device, shard, prompts)


def _sentence_teacher(
    spec: TeacherSpec,
    folder: Path,
    name: str,
    device: torch.device | str,
    shard: Shard | None,
    prompts: PromptSet,
) -> TextTeacher:
    began, words = time.perf_counter(), read_sentence_folder(folder)
    if spec.prompts == "plain" and words.prompt:
        prompts = prompts.behind(words.prompt)
    loaded = load_folder(
        words.model, part="text", dtype=TORCH_DTYPES[spec.precision], local_files_only=True
    )
    tokenizer = load_tokenizer(str(_tokenizer_folder(folder, words)))
    tail = longest_tail(tokenizer, prompts)
    asked = spec.length or words.length or DEFAULT_LENGTH
    reach = inspect_text(loaded.backbone, tokenizer, folder, length=asked + tail)
    length = _length(spec, reach, asked, tail, folder)
    pooling = _text_pooling(spec, words, loaded, reach)
    maps, dim = load_maps(words.maps) if words.maps else None, reach.width
    model: Any = loaded.backbone
    if pooling == "own":
        refuse_placement(spec, f"{name} with pooling projected")
        tower = own_text_tower(loaded, reach, tokenizer, str(folder), length=reach.row or length)
        dim = getattr(tower.projection, "out_features", reach.width)
        pad = int(tokenizer.pad_token_id)
        model = OwnVectors(tower, dim=dim, row=reach.row, pad_token=pad)
    note = f"{name}: {type(loaded.backbone).__name__}, {said(spec, words, pooling, length)}"
    return TextTeacher(
        placed(spec, model, device),
        tokenizer,
        prompts,
        name=name,
        hashes=(weights_hash(words.model), _tokenizer_hash(folder, tokenizer)),
        pooling=pooling,
        layer=spec.layer,
        length=length,
        unit_norm=spec.unit_norm,
        precision=spec.precision,
        batch_tokens=spec.batch_tokens,
        shard=shard,
        dim=dim if maps is None else width_of(maps),
        maps=maps,
        lowercase=words.lowercase,
        settings=settings_of(
            words.model, tokenizer=tokenizer_digest(tokenizer), maps=_maps_hash(words)
        ),
        note=f"{note}{said_otherwise(tokenizer)}; {took(began)}",
    )


def _text_pooling(
    spec: TeacherSpec, words: SentenceFolder, loaded: Loaded, reach: Reach
) -> Literal["mean", "last", "cls", "own"]:
    """The spec's, else the folder's, else what the model pools by itself, else the mean."""
    asked = spec.pooling
    if asked == "auto":
        own = loaded.pair is not None or loaded.projection is not None or reach.pools
        asked = words.pooling or ("projected" if own else "mean")
    if asked != "projected":
        return asked
    if loaded.projection is None and not reach.pools:
        raise ConfigError(
            f"{spec.model} gives no vector of a text by itself, so pooling can't be projected; "
            "use mean, last or cls"
        )
    if spec.layer != -1:
        raise ConfigError("pooling projected runs all blocks; leave out layer, or use mean or last")
    return "own"


def _length(spec: TeacherSpec, reach: Reach, asked: int, tail: int, folder: Path) -> int:
    """Tokens of a text, so that its row is one that the model can read."""
    if reach.longest is None:
        return asked if reach.row is None else min(asked, reach.row)
    fits = reach.longest - tail
    if fits < 1 or (spec.length is not None and spec.length > fits):
        behind = f", {tail} of them for the prompt's words" if tail else ""
        raise ConfigError(
            f"length is {asked}, but {folder} reads at most {reach.longest} tokens{behind}; "
            f"set length={max(1, fits)} or less"
        )
    return fits


def said(spec: TeacherSpec, words: SentenceFolder, pooling: str, length: int) -> str:
    """How a text becomes a vector, and what of the folder's own word is not followed."""
    parts = [f"pooling {pooling} of {length} tokens at most"]
    if words.pooling is not None and spec.pooling != "auto" and spec.pooling != words.pooling:
        parts.append(f"though its 1_Pooling says {words.pooling}")
    if words.maps:
        parts.append("then " + ", ".join(place.name for place in words.maps))
    if words.prompt:
        used = "behind" if spec.prompts == "plain" else "without"
        parts.append(f"{used} its default prompt {words.prompt!r}")
    if words.prompts:
        parts.append(f"its prompts {', '.join(words.prompts)} are not used")
    return ", ".join(parts)


def longest_tail(tokenizer: PreTrainedTokenizerFast, prompts: PromptSet) -> int:
    """Tokens that prompts with facets add to a text, at most."""
    tails = [
        len(tokenizer(reading.prompt("") + " ".join(reading.facets))["input_ids"])
        + len(reading.facets)
        for reading in prompts.readings
        if reading.facets
    ]
    return max(tails, default=0)


def _tokenizer_folder(folder: Path, words: SentenceFolder) -> Path:
    """sentence-transformers keeps it beside the model or in the folder above."""
    inside = any((words.model / name).exists() for name in ("tokenizer.json", "vocab.txt"))
    return words.model if inside else folder


def _tokenizer_hash(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    file = folder / "tokenizer.json"
    return sha256_of(file) if file.exists() else tokenizer_digest(tokenizer)


def _maps_hash(words: SentenceFolder) -> str:
    return "".join(sha256_of(place / "model.safetensors") for place in words.maps)
