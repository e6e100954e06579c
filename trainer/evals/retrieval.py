"""Image-text retrieval where several items answer a query.

A query is answered when one of its right items is among the first k: image to text, the share of
distinct pictures for which one of their captions is; text to image, the share of captions whose
picture is. `pairing` says which pictures and texts there are, and which are right.

Any text of a sample can be the caption: its name, a description of several sentences, a list of
captions, or a translation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.data.tokenize import token_ids
from trainer.errors import ConfigError
from trainer.evals.context import EvalContext, Wanted, holder
from trainer.evals.features import Share, embed_images, embed_texts
from trainer.evals.pairing import Groups, Pairs, paired, texts_of, with_text
from trainer.evals.scores import chance, percent
from trainer.evals.search import nearest
from trainer.recipe import Encode
from trainer.store import EmbeddingStore

CUTOFFS = (1, 5, 10)


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Recall at 1, 5 and 10, images to texts and texts to images, each beside its chance."""
    share = embed_images(config.data, encode, context, limit=config.limit)
    return figures_of(share, config.caption, config, encode, context)


def wanted(config: EvalConfig) -> list[Wanted]:
    """Texts, and their vectors in the store where the evaluation names one."""
    return texts_wanted(config, config.caption, config.text_store)


def texts_wanted(config: EvalConfig, caption: str, store: Path | None) -> list[Wanted]:
    """That some sample has a text under the key, and the store vectors of some sample."""
    what = f"a text under {caption!r} (set caption)"
    wishes = [Wanted(config.data, what, lambda record: bool(texts_of(record, caption)))]
    if store is not None:
        holds = holder(store)
        what = f"a vector in {store} (it must be made from these shards)"
        wishes.append(Wanted(config.data, what, lambda record: holds(record.sample_id)))
    return wishes


def figures_of(
    share: Share, caption: str, config: EvalConfig, encode: Encode, context: EvalContext
) -> dict[str, float]:
    """Recalls and chances of encoded images and the texts under the key `caption`."""
    comm = context.comm
    share = with_text(share, caption, spec=config.data, comm=comm)
    pairs = paired(share, comm, caption=caption, picture=config.picture)
    images = share.features[torch.tensor(pairs.own, dtype=torch.int64, device=comm.device)]
    first, last = comm.row_range(len(pairs.texts))
    texts = _text_features(pairs, caption, config, encode, context)[first:last]
    figures: dict[str, float] = {}
    for name, queries, gallery, of_queries, of_gallery in (
        ("image_to_text", images, texts, pairs.pictures, pairs.named),
        ("text_to_image", texts, images, pairs.named, pairs.pictures),
    ):
        found = recalls(queries, gallery, of_queries, of_gallery, cutoffs=CUTOFFS, comm=comm)
        figures |= {f"{name}_r{k}": value for k, value in found.items()}
        guessed = chances(of_queries, of_gallery, cutoffs=CUTOFFS)
        figures |= {f"chance_{name}_r{k}": value for k, value in guessed.items()}
    counts = (pairs.num_samples, len(pairs.pictures), len(pairs.texts))
    figures |= dict(zip(("samples", "pictures", "texts"), map(float, counts), strict=True))
    if config.text_store is None and context.tokenizer is not None:
        figures["unread"] = percent_unread(pairs.texts, context.tokenizer, context.text_length)
    return figures


def _text_features(
    pairs: Pairs, caption: str, config: EvalConfig, encode: Encode, context: EvalContext
) -> Float[Tensor, "n dim"]:
    """Of all texts, on every rank; a caption that several pictures share is encoded once."""
    if config.text_store is not None:
        _refuse_several(pairs, caption, config)
        return stored_texts(pairs.samples, config, context)
    places = {text: place for place, text in enumerate(dict.fromkeys(pairs.texts))}
    features = embed_texts(list(places), encode, context)
    return features[torch.tensor([places[text] for text in pairs.texts], device=features.device)]


def _refuse_several(pairs: Pairs, caption: str, config: EvalConfig) -> None:
    """A store has vectors by sample, so it can't tell a sample's captions apart."""
    sample, count = Counter(pairs.samples).most_common(1)[0]
    if count > 1:
        raise ConfigError(
            f"evaluation {config.label}: sample {sample} of {config.data} has {count} texts under "
            f"{caption!r}, and {config.text_store} holds vectors by sample; name a key with one "
            "text as `caption`, or write shards with one sample per caption (equal pictures count "
            "as one)"
        )


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
    of_queries: Groups,
    of_gallery: Groups,
    *,
    cutoffs: Sequence[int],
    comm: Comm,
) -> dict[int, float]:
    """Percent of queries with a right item among the first k by cosine, for each cut-off k.

    Features are this rank's contiguous shares; groups are those of all ranks' items, known to
    every rank. An item is right when it shares a group with the query.
    """
    rows = nearest(
        F.normalize(queries, dim=1), F.normalize(gallery, dim=1), k=max(cutoffs), comm=comm
    ).rows
    positions = _first_right(comm.gather_rows(rows).tolist(), of_queries, of_gallery)
    count = len(positions)
    return {k: percent(sum(position < k for position in positions), count) for k in cutoffs}


def chances(of_queries: Groups, of_gallery: Groups, *, cutoffs: Sequence[int]) -> dict[int, float]:
    """The same percentages for a random order of the gallery."""
    items: dict[str, set[int]] = defaultdict(set)
    for item, groups in enumerate(of_gallery):
        for group in groups:
            items[group].add(item)
    num_right = torch.tensor(
        [len(set().union(*(items[group] for group in groups))) for groups in of_queries],
        dtype=torch.int64,
    )
    size = len(of_gallery)
    alone = Comm.solo()
    return {k: chance(num_right, num_choices=size, num_guesses=k, comm=alone) for k in cutoffs}


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


def _first_right(rows: list[list[int]], of_queries: Groups, of_gallery: Groups) -> list[int]:
    """Per query, the rank (from 0) of its first right item; beyond the last where there is none."""
    positions = []
    for found, wanted in zip(rows, of_queries, strict=True):
        right = (i for i, row in enumerate(found) if row >= 0 and wanted & of_gallery[row])
        positions.append(next(right, len(found)))
    return positions
