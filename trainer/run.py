"""What a run's configuration means: its tokenizer, stream, and the contexts of recipe and evals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import EvalConfig, RunConfig, WordsConfig
from trainer.data.pixels import Pixels
from trainer.data.sets import refuse_another_set
from trainer.data.stream import Stream
from trainer.data.vocabulary import tokenizer_for
from trainer.errors import ConfigError
from trainer.evals import EvalContext
from trainer.models.config import ModelConfig, TwoTowerConfig
from trainer.models.load import model_pixels, pixels_note
from trainer.models.tower import Tower
from trainer.parts.averaged_weights import AveragedWeights
from trainer.recipe import Context, Recipe
from trainer.stop import Check, go_on
from trainer.store import EmbeddingStore
from trainer.store.images import StoredImages
from trainer.store.sources import made_of

AVERAGE = "average"
"""The part that follows the weights, in a recipe's parts and in checkpoints."""
NEED_TEXTS = frozenset({"zero_shot", "retrieval", "cross_lingual"})
"""Evaluations that compare images with texts."""


def text_model_of(config: RunConfig) -> TwoTowerConfig | None:
    """The model's configuration where it reads texts, else None."""
    model = config.recipe.model
    return model if isinstance(model, TwoTowerConfig) else None


def words_of(config: RunConfig) -> WordsConfig | None:
    """How captions are cut; None where nothing reads them."""
    model = text_model_of(config)
    if model is None:
        return config.recipe.words()
    path = model.tokenizer or model.text.path
    size = None if path else model.vocabulary
    return WordsConfig(length=model.text_length, vocabulary=size, tokenizer=path)


def refuse_text_evals(config: RunConfig) -> None:
    """A ConfigError if an evaluation needs texts that the model can't read, or has other ones."""
    wrong = [e for e in config.evals if e.name in NEED_TEXTS and e.text_store is None]
    if wrong and text_model_of(config) is None:
        raise ConfigError(
            f"evaluation {wrong[0].label}: {wrong[0].name} compares images with texts, and the "
            f"model of {config.recipe.name} reads none; use knn or linear_probe, "
            "or give the vectors of the texts (text_store)"
        )
    for store in config.recipe.stores():
        for entry in config.evals:
            _refuse_other_space(entry, store)


def _refuse_other_space(entry: EvalConfig, store: Path) -> None:
    """A ConfigError where an evaluation's texts are of another model than those trained on."""
    if entry.text_store is None or "{}" in str(entry.text_store):
        return
    trained_on = EmbeddingStore.open(store).identity
    compared = EmbeddingStore.open(entry.text_store).identity
    for key in ("model", "layer", "pooling", "projection", "dim"):
        if getattr(trained_on, key) != getattr(compared, key):
            raise ConfigError(
                f"evaluation {entry.label}: {entry.text_store} holds vectors of "
                f"{compared.teacher} and the run learns from {store} of {trained_on.teacher}, "
                f"but their {key} differs; make both in one way"
            )


def tokenizer_of(config: RunConfig, comm: Comm) -> PreTrainedTokenizerFast | None:
    """The tokenizer that the run names, or one trained on its captions and kept in its workdir.

    None for a method that reads no captions: its shards need none.
    """
    words = words_of(config)
    if words is None:
        return None
    plain = tokenizer_for(
        words.tokenizer,
        config.data,
        comm,
        folder=config.workdir / "tokenizer",
        vocabulary=words.vocabulary or 0,  # a given tokenizer has its own
        length=words.length,
        seed=config.seed,
    )
    prompted: PreTrainedTokenizerFast = config.recipe.prompted(plain)
    return prompted


def stream_of(
    config: RunConfig,
    comm: Comm,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    micro_batch: int,
    before: Sequence[str] | None = None,
) -> Stream:
    """The training samples; `before` are the shards of the checkpoint that is gone on from."""
    return Stream(
        config.data,
        comm,
        tokenizer=tokenizer,
        image_size=config.recipe.model.image_size,
        text_length=_text_length(config),
        seed=config.seed,
        global_batch=config.global_batch,
        micro_batch=micro_batch,
        workdir=config.workdir,
        join=config.recipe.join(config.seed),
        views=config.recipe.wanted_views(),
        pixels=pixels_of(config),
        stored=stored_of(config),
        before=before,
    )


def refuse_other_data(config: RunConfig, lines: Sequence[str]) -> None:
    """A DataError where a folder of vectors or labels that the recipe names was made of other
    shards with the names of the run's, whose samples it would be taken to know."""
    shards = dict(line.rsplit(" ", 1) for line in lines)
    known = {name: digest for name, digest in shards.items() if digest != "-"}
    for folder in dict.fromkeys(_folders_in(config.recipe)):
        refuse_another_set(made_of(folder), known, folder=folder)


def _folders_in(value: Any) -> Iterator[Path]:
    """Every path in a section, and in the sections and lists inside it."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        yield from chain.from_iterable(_folders_in(each) for _, each in value)
    elif isinstance(value, tuple | list):
        yield from chain.from_iterable(map(_folders_in, value))


def pixels_of(config: RunConfig) -> Pixels:
    """How images become the model's input: for a loaded image tower, as its folder says."""
    model = config.recipe.model
    if isinstance(model, ModelConfig):
        return model_pixels(model, config.data.background)
    return Pixels(model.image_size, background=config.data.background)


def stored_of(config: RunConfig) -> StoredImages | None:
    """What the model reads in place of images, if it does."""
    section = getattr(getattr(config.recipe.model, "image", None), "stored", None)
    if section is None:
        return None
    return StoredImages(section.folders, dim=section.dim, seed=config.seed)


def loading_notes(config: RunConfig, recipe: Recipe) -> list[str]:
    """What was found about loaded towers and parts, and how images are prepared; a line each."""
    towers = [module for module in recipe.model.modules() if isinstance(module, Tower)]
    notes = [tower.note for tower in towers]
    notes += [str(getattr(part, "note", "")) for part in recipe.parts.values()]
    notes = [note for note in notes if note]
    section = config.recipe.model
    if isinstance(section, ModelConfig) and section.image.path is not None:
        notes.append(pixels_note(section, section.image.path))
    return notes


def add_average(recipe: Recipe, config: RunConfig) -> AveragedWeights | None:
    """The momentum copy of weights that a run asks for, from now on a part of its recipe."""
    if config.average is None:
        return None
    if AVERAGE in recipe.parts:
        raise ConfigError(
            f"average: {config.recipe.name} has a part of its own called {AVERAGE}, under whose "
            "name the checkpoint would keep the average; drop it, or rename the part"
        )
    average = AveragedWeights(config.average, steps=config.steps)
    recipe.parts = {**recipe.parts, AVERAGE: average}
    return average


def context_of(
    config: RunConfig,
    comm: Comm,
    tokenizer: PreTrainedTokenizerFast | None,
    check: Check = go_on,
    shape: Mapping[str, Any] | None = None,
) -> Context:
    return Context(
        comm=comm,
        text_tokenizer=tokenizer,
        seed=config.seed,
        global_batch=config.global_batch,
        steps=config.steps,
        workdir=config.workdir,
        data=config.data,
        shape=shape,
        check=check,
    )


def eval_context(
    config: RunConfig,
    comm: Comm,
    tokenizer: PreTrainedTokenizerFast | None,
    check: Check = go_on,
) -> EvalContext:
    stored = stored_of(config)
    if stored is not None:
        stored.check(comm, views=1)
    return EvalContext(
        comm=comm,
        tokenizer=tokenizer,
        image_size=config.recipe.model.image_size,
        text_length=_text_length(config),
        data=config.data,
        seed=config.seed,
        check=check,
        pixels=pixels_of(config),
        stored=stored,
    )


def _text_length(config: RunConfig) -> int:
    words = words_of(config)
    return 0 if words is None else words.length
