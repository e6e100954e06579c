"""Zero-shot classification: an image gets the class whose prompts are closest to it.

A class is the mean of its prompts' unit vectors, made a unit vector (Radford et al.,
arXiv 2103.00020, section 3.1.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, ShardSet
from trainer.data.texts import text_id
from trainer.errors import ConfigError, DataError
from trainer.evals.context import EvalContext, Wanted, holder
from trainer.evals.features import embed_images, embed_texts
from trainer.evals.floors import LARGEST_BANK, chances, pixel_floor
from trainer.evals.labels import answers, class_names, class_of, class_wanted, with_class
from trainer.evals.samples import Record, values_of
from trainer.evals.scores import tally
from trainer.evals.search import nearest
from trainer.prompt_templates import read_names
from trainer.recipe import Encode
from trainer.store import EmbeddingStore


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Accuracy over the classes that occur in the test shards, beside chance and pixel floor."""
    comm = context.comm
    share = embed_images(config.data, encode, context, limit=config.limit)
    share = with_class(share, config.target, spec=config.data, comm=comm)
    names = list_of_classes(config) or class_names(share, config.target, comm)
    labels = names if config.class_names is None else [str(n) for n in range(len(names))]
    _refuse_unlisted(config, class_names(share, config.target, comm), labels)
    texts = prompts(names, config.templates)
    if config.text_store is None:
        vectors = embed_texts(texts, encode, context)
    else:
        vectors = stored_prompts(texts, config, dim=share.features.shape[1]).to(comm.device)
    vectors = vectors.view(len(names), len(config.templates), -1)
    right = answers(share, config.target, labels, comm)
    figures = tally(
        rank_classes(share.features, classifier(vectors)),
        right,
        num_classes=len(names),
        comm=comm,
    )
    return {**figures, **chances(right, len(names), comm), **_pixel_floor(config, context)}


def wanted(config: EvalConfig) -> list[Wanted]:
    """Classes, and their prompts in the store where the evaluation names one."""
    wishes = [class_wanted(config, config.data)]
    if config.train is not None:
        wishes.append(Wanted(config.train, "anything", lambda record: True))
    if config.text_store is not None:
        holds, listed = holder(config.text_store), list_of_classes(config)

        def is_stored(record: Record) -> bool:
            name = class_of(record, config.target)
            if listed and name is not None:
                name = listed[int(name)] if name.isdigit() and int(name) < len(listed) else None
            return name is not None and holds(text_id(prompts([name], config.templates)[0]))

        what = f"a class whose prompts are in {config.text_store} (set templates and target)"
        wishes.append(Wanted(config.data, what, is_stored))
    return wishes


def list_of_classes(config: EvalConfig) -> list[str]:
    """The names in the evaluation's file, in its order; empty where it names none."""
    if config.class_names is None:
        return []
    try:
        return read_names(config.class_names)
    except ValueError as error:
        raise DataError(f"evaluation {config.label}: class_names: {error}") from error


def _refuse_unlisted(config: EvalConfig, found: Sequence[str], labels: Sequence[str]) -> None:
    if unlisted := sorted({*found} - {*labels}):
        raise DataError(
            f"evaluation {config.label}: a sample's {config.target} is {unlisted[0]!r}, and "
            f"{config.class_names} names the classes 0 to {len(labels) - 1}; set target (cls) to "
            "the key that holds the line's number"
        )


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template; the templates of a name stand together."""
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"template {template!r} has no {{}} for the class name")
    return [template.replace("{}", name) for name in names for template in templates]


def prompts_of(config: EvalConfig) -> list[str]:
    """The prompts of all classes of an evaluation's shards; no image is decoded."""
    if listed := list_of_classes(config):
        return prompts(listed, config.templates)
    shards, names = ShardSet.open(config.data), set()
    for index in range(len(shards)):
        try:
            raw = shards.read(index)
            name = class_of(Record(raw.sample_id, values_of(raw.fields)), config.target)
        except (BadSample, DamagedSample):
            continue
        names |= {name} - {None}
    return prompts(sorted(map(str, names)), config.templates)


def stored_prompts(
    texts: Sequence[str], config: EvalConfig, *, dim: int
) -> Float[Tensor, "n {dim}"]:
    """Unit vectors of prompts from a store that was made of texts; DataError where one lacks."""
    assert config.text_store is not None
    store = EmbeddingStore.open(config.text_store)
    if store.dim != dim:
        raise ConfigError(
            f"evaluation {config.label}: {store.folder} holds vectors of {store.dim} numbers, the "
            f"model gives {dim}"
        )
    ids = torch.tensor([text_id(text) for text in texts])
    lacking = np.flatnonzero(~np.isin(ids.numpy(), store.ids))
    if len(lacking):
        raise DataError(
            f"{store.folder} lacks {len(lacking)} of {len(texts)} prompts of evaluation "
            f"{config.label}, as {texts[lacking[0]]!r}; make it anew with tools/embed.py "
            "--class-names and this run's YAML"
        )
    return F.normalize(store.vectors(ids, config.text_vectors).mean(dim=1), dim=1)


def classifier(
    vectors: Float[Tensor, "classes templates dim"],
) -> Float[Tensor, "classes dim"]:
    """One unit vector per class: the mean of its prompts' unit vectors, normalised again."""
    return F.normalize(F.normalize(vectors, dim=-1).mean(dim=1), dim=-1)


def rank_classes(
    images: Float[Tensor, "n dim"], classes: Float[Tensor, "classes dim"]
) -> Int64[Tensor, "n k"]:
    """The five classes (or all, where there are fewer) of highest cosine, best first."""
    alone = Comm.solo(images.device)
    k = min(5, classes.shape[0])
    return nearest(F.normalize(images, dim=-1), classes, k=k, comm=alone).rows


def _pixel_floor(config: EvalConfig, context: EvalContext) -> Mapping[str, float]:
    """Bank: `train` of the evaluation, else the run's own training shards where indexed."""
    bank = config.train or context.data.train
    if bank == config.data or (config.train is None and context.data.reader != "indexed"):
        return {}
    return pixel_floor(
        config.data,
        bank,
        target=config.target,
        limit=config.limit,
        bank_limit=LARGEST_BANK,
        data=context.data,
        comm=context.comm,
        check=context.check,
    )
