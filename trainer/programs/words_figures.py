"""How good the words of a lexical model are: search by an index, precision, patches told apart.

Images and captions are read densely, then made sparse as the run's evaluations have them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from trainer.evals.context import EvalContext
from trainer.evals.features import embed_texts
from trainer.evals.inverted_index import (
    inverted_index,
    num_products,
    search_index,
    share_found,
)
from trainer.evals.regions import majority_labels, mean_iou, named_patches, painted
from trainer.evals.samples import Record, read_blocks
from trainer.evals.search import nearest
from trainer.hashing import key_of, permutation
from trainer.kernels.patch_maximum import elu1p, patch_maximum
from trainer.models.lexical_tower import LexicalTowers
from trainer.programs.workdir import encoder

FIRST = 10
"""Rows that a search is compared by."""
Result = TypeVar("Result")


class Seen(NamedTuple):
    """The images of some shards, and what the model says of them."""

    images: UInt8[Tensor, "n 3 size size"]
    records: list[Record]
    patches: Float[Tensor, "n states dim"]
    """In the space of the words' rows."""
    rows: Float[Tensor, "n words"]
    """Dense lexical vectors."""

    @property
    def captions(self) -> list[str]:
        return [str(record.values.get("txt", "")) for record in self.records]


def read_images(spec: str, model: LexicalTowers, context: EvalContext, limit: int) -> Seen:
    images, records, patches = [], [], []
    pixels = context.pixels
    assert pixels is not None
    for block in read_blocks(
        spec,
        size=context.image_size,
        limit=limit,
        data=context.data,
        comm=context.comm,
        pixels=pixels,
    ):
        images.append(block.images[block.usable])
        patches.append(model.patches(pixels.normalized(block.images))[block.usable])
        records += block.records
    states = torch.cat(patches)
    return Seen(torch.cat(images), records, states, loudest_words(states, model))


def loudest_words(
    patches: Float[Tensor, "n states dim"], model: LexicalTowers
) -> Float[Tensor, "n words"]:
    return normalize(patch_maximum(patches, model.image_words.weight, activated=True), dim=1)


def words_in(record: Record, names: Sequence[str]) -> set[int]:
    """Coordinates whose word stands in the sample's caption or keywords."""
    keywords = record.values.get("keywords")
    phrases = keywords if isinstance(keywords, list) else []
    text = " ".join([str(record.values.get("txt", "")), *map(str, phrases)]).lower()
    said = set(re.findall(r"\w+", text))
    return {place for place, name in enumerate(names) if name.lower() in said}


def search_figures(seen: Seen, model: LexicalTowers, context: EvalContext) -> dict[str, float]:
    """Captions look for images: how much of the dense ranking's first rows the index returns."""
    captions = seen.captions
    texts = dense_texts(captions, model, context)
    images, queries = (model.kept(rows) for rows in (seen.rows, texts))
    index = inverted_index(images)
    dense, dense_seconds = timed(lambda: nearest(texts, seen.rows, k=FIRST, comm=context.comm))
    found, seconds = timed(lambda: search_index(index, queries, k=FIRST))
    own = torch.arange(len(texts))[:, None]
    return {
        "words": float(seen.rows.shape[1]),
        "words said by an image": float((images > 0).sum(dim=1).float().mean()),
        "words said by a caption": float((queries > 0).sum(dim=1).float().mean()),
        f"index: share of the dense first {FIRST}": share_found(found.rows, dense.rows),
        "index: share of the dense products": num_products(index, queries)
        / (len(texts) * seen.rows.numel()),
        "index: seconds by those of the dense product": seconds / dense_seconds,
        f"caption to image in the first {FIRST}, dense": share_found(dense.rows, own),
        f"caption to image in the first {FIRST}, index": share_found(found.rows, own),
    }


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and the seconds of the fastest of three calls."""
    laps = []
    for _ in range(3):
        begin = perf_counter()
        result = work()
        laps.append(perf_counter() - begin)
    return result, min(laps)


def precision_figures(
    rows: Float[Tensor, "n words"], right: Sequence[set[int]], *, first: int = 5
) -> dict[str, float]:
    """Of an image's loudest words, the share that its caption or keywords have; beside that of
    words drawn blindly. Of images that have any such word."""
    known = [(row, said) for row, said in zip(rows, right, strict=True) if said]
    if not known:
        return {}
    top = [row.topk(min(first, len(row))).indices.tolist() for row, _ in known]
    hits = sum(
        place in said for places, (_, said) in zip(top, known, strict=True) for place in places
    )
    blind = sum(len(said) for _, said in known) / rows.shape[1] / len(known)
    return {
        f"right words among an image's first {first}": hits / sum(map(len, top)),
        "the same, drawn blindly": blind,
    }


def mosaic_figures(seen: Seen, model: LexicalTowers, context: EvalContext) -> dict[str, float]:
    """Patch-level discrimination on pictures of four images: each patch is asked whose it is.

    The masks are the quarters. Classes are the four captions; equal captions share no mosaic.
    """
    captions = seen.captions
    chosen = list({caption: place for place, caption in enumerate(captions)}.values())
    count, size, side = (
        len(chosen) // 4,
        context.image_size,
        model.patches_a_side(seen.patches.shape[1]),
    )
    if not count or side % 2 or size % 2:
        return {}
    places = torch.tensor(chosen)[permutation(len(chosen), key_of(context.seed, "mosaics"))]
    fours = places[: 4 * count].view(count, 4)
    patches = patches_of(mosaics_of(seen.images[fours], size), model, context)
    masks = painted(torch.arange(4).repeat(count, 1), height=size, width=size)
    named = dense_texts([captions[place] for place in fours.flatten()], model, context)
    classes = named.view(count, 4, -1)
    said = normalize(elu1p(patches @ model.image_words.weight.T), dim=2)
    found = torch.cat(
        [named_patches(own[None], four) for own, four in zip(said, classes, strict=True)]
    )
    best = majority_labels(masks, side=side, num_classes=4)
    iou = {
        name: mean_iou(painted(labels, height=size, width=size), masks, num_classes=4)
        for name, labels in (("found", found), ("best", best))
    }
    return {
        "patches of four images told apart": float((found == best).float().mean()),
        "mean intersection over union of the quarters": iou["found"],
        "the best that a grid of patches can": iou["best"],
    }


def mosaics_of(
    images: UInt8[Tensor, "mosaics 4 3 size size"], size: int
) -> UInt8[Tensor, "mosaics 3 size size"]:
    """Four images of half their size a picture."""
    half, count = size // 2, len(images)
    quarters = interpolate(images.flatten(0, 1).float(), size=(half, half), mode="area")
    rows = quarters.view(count, 2, 2, 3, half, half).permute(0, 3, 1, 4, 2, 5)
    return rows.reshape(count, 3, size, size).to(torch.uint8)


def patches_of(
    images: UInt8[Tensor, "n 3 size size"], model: LexicalTowers, context: EvalContext
) -> Float[Tensor, "n patches dim"]:
    """Without states that stand for no patch."""
    assert context.pixels is not None
    states = model.patches(context.pixels.normalized(images))
    return states[:, states.shape[1] - model.patches_a_side(states.shape[1]) ** 2 :]


def dense_texts(
    texts: Sequence[str], model: LexicalTowers, context: EvalContext
) -> Float[Tensor, "n words"]:
    sparse, model.sparse = model.sparse, "none"
    try:
        return embed_texts(texts, encoder(model), context)
    finally:
        model.sparse = sparse
