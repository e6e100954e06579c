"""Image-text retrieval where several items answer a query.

A query is answered when one of its right items is among the first k. A caption that several
samples share is one text. Image and text belong together when they share a concept:

- an image has the concepts of all samples with the same picture (json key `pix`);
- a text has the concepts of all samples with that caption;
- a sample's concept is its json key `concept_id`, else the caption itself.

So no duplicate counts as a miss. Unions are not closed transitively: two names of one drawing are
both right for it, but the other drawings of one name aren't right for the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.evals.context import EvalContext
from trainer.evals.features import Share, embed_images, embed_texts
from trainer.evals.labels import class_of, with_class
from trainer.evals.samples import Record
from trainer.evals.scores import chance, percent
from trainer.evals.search import nearest
from trainer.recipe import Encode

CUTOFFS = (1, 5, 10)

Concepts = Sequence[frozenset[str]]
"""Per item, the concepts that it shows or names."""


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Recall at 1, 5 and 10, images to texts and texts to images, each beside its chance."""
    comm = context.comm
    share = embed_images(config.data, encode, context, limit=config.limit)
    share = with_class(share, "txt", spec=config.data, comm=comm)
    image_concepts, texts, text_concepts = pairing(share, comm)
    features = embed_texts(texts, encode, context)
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
    return {**figures, "samples": float(len(image_concepts)), "texts": float(len(texts))}


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


def pairing(share: Share, comm: Comm) -> tuple[Concepts, list[str], Concepts]:
    """(concepts of each image, the distinct captions, concepts of each caption), of all ranks."""
    own = [[_picture(record), _concept(record), _caption(record)] for record in share.records]
    triples: list[list[str]] = list(chain.from_iterable(comm.gather_json(own)))
    of_picture: dict[str, set[str]] = defaultdict(set)
    of_caption: dict[str, set[str]] = defaultdict(set)
    for picture, concept, caption in triples:
        of_picture[picture].add(concept)
        of_caption[caption].add(concept)
    images = [frozenset(of_picture[picture]) for picture, _, _ in triples]
    return images, list(of_caption), [frozenset(concepts) for concepts in of_caption.values()]


def _first_right(
    rows: list[list[int]], query_concepts: Concepts, gallery_concepts: Concepts
) -> list[int]:
    """Per query, the rank (from 0) of its first right item; beyond the last where there is none."""
    positions = []
    for found, wanted in zip(rows, query_concepts, strict=True):
        right = (i for i, row in enumerate(found) if row >= 0 and wanted & gallery_concepts[row])
        positions.append(next(right, len(found)))
    return positions


def _caption(record: Record) -> str:
    return " ".join(str(class_of(record, "txt")).split())


def _concept(record: Record) -> str:
    return class_of(record, "concept_id") or _caption(record)


def _picture(record: Record) -> str:
    """Samples of equal value have the same picture; without `pix`, every sample is its own."""
    return class_of(record, "pix") or f"sample {record.sample_id}"
