"""Image-text retrieval where several items answer a query.

A query is answered when one of its right items is among the first k. A caption that several
samples share is one text. Image and text belong together when they share a concept:

- an image has the concepts of all samples with the same picture (json key `pix`);
- a text has the concepts of all samples with that caption;
- a sample's concept is its json key `concept_id`, else the caption itself.

Any text of a sample can be the caption: its name, a description of several sentences, or a
translation.

So no duplicate counts as a miss. Unions are not closed transitively: two names of one drawing are
both right for it, but the other drawings of one name aren't right for the other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.data.tokenize import token_ids
from trainer.errors import DataError
from trainer.evals.context import EvalContext
from trainer.evals.features import Share, embed_images, embed_texts
from trainer.evals.labels import class_of
from trainer.evals.samples import Record
from trainer.evals.scores import chance, percent
from trainer.evals.search import nearest
from trainer.recipe import Encode
from trainer.store import EmbeddingStore

CUTOFFS = (1, 5, 10)

Concepts = Sequence[frozenset[str]]
"""Per item, the concepts that it shows or names."""


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Recall at 1, 5 and 10, images to texts and texts to images, each beside its chance."""
    share = embed_images(config.data, encode, context, limit=config.limit)
    return figures_of(share, config.caption, config, encode, context)


def figures_of(
    share: Share, caption: str, config: EvalConfig, encode: Encode, context: EvalContext
) -> dict[str, float]:
    """Recalls and chances of encoded images and the texts under the key `caption`."""
    comm = context.comm
    share = with_text(share, caption, spec=config.data, comm=comm)
    image_concepts, texts, text_concepts = pairing(share, comm, caption=caption)
    if config.text_store is None:
        features = embed_texts(list(texts), encode, context)
    else:
        features = stored_texts(list(texts.values()), config, context)
    first, last = comm.row_range(len(texts))
    own_texts = features[first:last]
    figures: dict[str, float] = {}
    for name, queries, gallery, of_queries, of_gallery in (
        ("image_to_text", share.features, own_texts, image_concepts, text_concepts),
        ("text_to_image", own_texts, share.features, text_concepts, image_concepts),
    ):
        found = recalls(queries, gallery, of_queries, of_gallery, cutoffs=CUTOFFS, comm=comm)
        figures |= {f"{name}_r{k}": value for k, value in found.items()}
        guessed = chances(of_queries, of_gallery, cutoffs=CUTOFFS)
        figures |= {f"chance_{name}_r{k}": value for k, value in guessed.items()}
    figures |= {"samples": float(len(image_concepts)), "texts": float(len(texts))}
    if config.text_store is None and context.tokenizer is not None:
        figures["unread"] = percent_unread(list(texts), context.tokenizer, context.text_length)
    return figures


def stored_texts(
    ids: Sequence[int], config: EvalConfig, context: EvalContext
) -> Float[Tensor, "n dim"]:
    """Unit vectors of the texts of these samples, from the store that the evaluation names."""
    assert config.text_store is not None
    store = EmbeddingStore.open(config.text_store)
    vectors = store.vectors(torch.tensor(ids, dtype=torch.int64), config.text_vectors)
    return F.normalize(vectors.mean(dim=1), dim=1).to(context.comm.device)


def recalls(
    queries: Float[Tensor, "n dim"],
    gallery: Float[Tensor, "local dim"],
    query_concepts: Concepts,
    gallery_concepts: Concepts,
    *,
    cutoffs: Sequence[int],
    comm: Comm,
) -> dict[int, float]:
    """Percent of queries with a right item among the first k by cosine, for each cut-off k.

    Features are this rank's contiguous shares; concepts are those of all ranks' items, known to
    every rank. An item is right when it shares a concept with the query.
    """
    rows = nearest(
        F.normalize(queries, dim=1), F.normalize(gallery, dim=1), k=max(cutoffs), comm=comm
    ).rows
    positions = _first_right(comm.gather_rows(rows).tolist(), query_concepts, gallery_concepts)
    count = len(positions)
    return {k: percent(sum(position < k for position in positions), count) for k in cutoffs}


def chances(
    query_concepts: Concepts, gallery_concepts: Concepts, *, cutoffs: Sequence[int]
) -> dict[int, float]:
    """The same percentages for a random order of the gallery."""
    items: dict[str, set[int]] = defaultdict(set)
    for item, concepts in enumerate(gallery_concepts):
        for concept in concepts:
            items[concept].add(item)
    num_right = torch.tensor(
        [len(set().union(*(items[c] for c in concepts))) for concepts in query_concepts],
        dtype=torch.int64,
    )
    size = len(gallery_concepts)
    alone = Comm.solo()
    return {k: chance(num_right, num_choices=size, num_guesses=k, comm=alone) for k in cutoffs}


def pairing(
    share: Share, comm: Comm, *, caption: str = "txt"
) -> tuple[Concepts, dict[str, int], Concepts]:
    """(concepts of each image, the distinct captions with a sample of each, concepts of each
    caption), of all ranks."""
    own = [
        [_picture(record), _concept(record, caption), text_of(record, caption), record.sample_id]
        for record in share.records
    ]
    rows: list[list[Any]] = list(chain.from_iterable(comm.gather_json(own)))
    of_picture: dict[str, set[str]] = defaultdict(set)
    of_caption: dict[str, set[str]] = defaultdict(set)
    samples: dict[str, int] = {}
    for picture, concept, text, sample_id in rows:
        of_picture[picture].add(concept)
        of_caption[text].add(concept)
        samples.setdefault(text, sample_id)
    images = [frozenset(of_picture[picture]) for picture, *_ in rows]
    return images, samples, [frozenset(concepts) for concepts in of_caption.values()]


def with_text(share: Share, caption: str, *, spec: str, comm: Comm) -> Share:
    """The rows that have a text under the key; a DataError, on every rank, where none has."""
    rows = [i for i, record in enumerate(share.records) if text_of(record, caption)]
    if not comm.any(bool(rows)):
        raise DataError(f"no sample of {spec} has a text under {caption!r}; set `caption`")
    index = torch.tensor(rows, dtype=torch.int64, device=share.features.device)
    return Share(share.features[index], [share.records[i] for i in rows])


def text_of(record: Record, caption: str) -> str:
    """A sample's text, white space collapsed; '' where it has none.

    `a.b` reads key b of the object under a; the items of a list are joined by commas.
    """
    value: Any = record.values
    for part in [caption] if caption in record.values else caption.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value)
    return " ".join(value.split()) if isinstance(value, str) else ""


def percent_unread(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> float:
    """Percent of the tokens that say nothing: unknown ones, and pieces of a single character.

    A tokenizer of bytes has no unknown token, but a script that it was not trained on falls into
    bytes, of which none is a character.
    """
    ids = [token for row in token_ids(tokenizer, texts, length=length) for token in row]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    counted = Counter(token for token in ids if token not in special)
    unread = sum(count for token, count in counted.items() if _says_nothing(token, tokenizer))
    return percent(unread, counted.total())


@lru_cache(maxsize=1 << 16)
def _says_nothing(token: int, tokenizer: PreTrainedTokenizerFast) -> bool:
    return token == tokenizer.unk_token_id or "\ufffd" in tokenizer.decode([token])


def _first_right(
    rows: list[list[int]], query_concepts: Concepts, gallery_concepts: Concepts
) -> list[int]:
    """Per query, the rank (from 0) of its first right item; beyond the last where there is none."""
    positions = []
    for found, wanted in zip(rows, query_concepts, strict=True):
        right = (i for i, row in enumerate(found) if row >= 0 and wanted & gallery_concepts[row])
        positions.append(next(right, len(found)))
    return positions


def _concept(record: Record, caption: str) -> str:
    return class_of(record, "concept_id") or text_of(record, caption)


def _picture(record: Record) -> str:
    """Samples of equal value have the same picture; without `pix`, every sample is its own."""
    return class_of(record, "pix") or f"sample {record.sample_id}"
