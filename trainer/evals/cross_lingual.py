"""Image-text retrieval once per language of the captions: trained on one, tested on each.

A model that can't read a language is at chance there, and `unread` tells which share of the
language's tokens are no more than bytes or unknown to it. FLAME, arXiv 2411.11927, evaluates on
Crossmodal-3600 in this way.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from trainer.config import EvalConfig
from trainer.errors import DataError
from trainer.evals.context import EvalContext, Wanted
from trainer.evals.features import Share, embed_images
from trainer.evals.retrieval import figures_of, texts_wanted
from trainer.evals.samples import Record
from trainer.recipe import Encode

KEY = "lang"


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """The figures of `retrieval` for each language, as `image_to_text_r1/de`; and their mean over
    the languages, without the suffix."""
    share = embed_images(config.data, encode, context, limit=config.limit)
    key = KEY if config.caption == "txt" else config.caption
    figures: dict[str, float] = {}
    languages = config.languages or _languages(share, key, config, context)
    for language in languages:
        store = config.text_store
        if store is not None:
            store = Path(str(store).replace("{}", language))
        own = config.model_copy(update={"text_store": store})
        found = figures_of(share, f"{key}.{language}", own, encode, context)
        figures |= {f"{name}/{language}": value for name, value in found.items()}
    means = {
        name: sum(figures[f"{name}/{language}"] for language in languages) / len(languages)
        for name in found
    }
    return {**means, **figures, "languages": float(len(languages))}


def wanted(config: EvalConfig) -> list[Wanted]:
    """Texts of each language that is named; texts of any, where none is."""
    key = KEY if config.caption == "txt" else config.caption
    if config.languages is None:
        what = f"texts by language under {key!r} (set caption)"
        return [Wanted(config.data, what, lambda record: bool(_texts_by_language(record, key)))]
    wishes = []
    for language in config.languages:
        store = config.text_store and Path(str(config.text_store).replace("{}", language))
        wishes += texts_wanted(config, f"{key}.{language}", store)
    return wishes


def _texts_by_language(record: Record, key: str) -> dict[str, Any]:
    texts = record.values.get(key)
    return texts if isinstance(texts, dict) else {}


def _languages(share: Share, key: str, config: EvalConfig, context: EvalContext) -> list[str]:
    """The keys of the samples' objects of texts, over all ranks, sorted."""
    own = sorted({name for record in share.records for name in _texts_by_language(record, key)})
    if found := sorted(set(chain.from_iterable(context.comm.gather_json(own)))):
        return found
    raise DataError(f"no sample of {config.data} has texts by language under {key!r}")
