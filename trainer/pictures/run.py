"""Pictures of a model at work: what its clusters hold, and which captions its images find."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain

import torch

from trainer.addresses import without_secrets
from trainer.config import DataConfig, EvalConfig, RunConfig
from trainer.data.decode import BadSample, decode_image
from trainer.data.fields import find_image
from trainer.data.labels import ClusterLabels
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import TrainerError
from trainer.evals import EvalContext
from trainer.evals.features import embed_images, embed_texts
from trainer.hashing import key_of, permutation
from trainer.pictures.montage import Hit, Pixels, Sample, cluster_montage, retrieval_montage
from trainer.pictures.page import ClusterCard
from trainer.recipe import Encode

SHOWN_SIZE = 96
SHOWN_SAMPLES = 512
"""Images that look for their caption among each other's."""
ROWS, COLUMNS = 8, 9


def training_pictures(
    groups: ClusterLabels | None,
    config: RunConfig,
    due: Sequence[EvalConfig],
    encode: Encode,
    context: EvalContext,
) -> Iterator[tuple[str, Pixels | str]]:
    """What to show beside the evaluations that are due: groups, and retrieval where it is due.

    Collective; the pictures are drawn on rank 0, and the other ranks get none. Where one fails, a
    sentence stands in its place.
    """
    drawings: dict[str, Callable[[], Pixels | None]] = {}
    if due and context.comm.is_main and groups is not None and config.data.reader == "indexed":
        drawings["clusters"] = partial(clusters_picture, groups, config.data, seed=config.seed)
    for evaluation in due:
        if evaluation.name == "retrieval" and evaluation.text_store is None:
            drawings[evaluation.label] = partial(
                retrieval_picture, evaluation.data, encode, context
            )
    for name, draw in drawings.items():
        picture = _attempted(draw)
        if picture is not None:
            yield name, picture


def _attempted(draw: Callable[[], Pixels | None]) -> Pixels | str | None:
    """A picture is drawn by one rank, after the last word with the others: it may fail alone."""
    try:
        return draw()
    except (TrainerError, OSError) as error:
        return str(error)
    except Exception as error:  # our own bug, for which no step of training may be lost
        sys.stderr.write(without_secrets(traceback.format_exc()))
        return f"{type(error).__name__}: {error}"


def clusters_picture(labels: ClusterLabels, data: DataConfig, *, seed: int) -> Pixels:
    """Some clusters, a row each, the largest first."""
    shown = chosen_clusters(labels, rows=ROWS, seed=seed)
    cards = cluster_cards(labels, data, shown, columns=COLUMNS)
    titles = [f"cluster {card.number}: {card.size} images" for card in cards]
    return cluster_montage([card.samples for card in cards], titles=titles)


def chosen_clusters(labels: ClusterLabels, *, rows: int, seed: int) -> list[int]:
    """Clusters of four or more, drawn by hash, the largest first."""
    sizes = torch.bincount(labels.labels.long())
    candidates = torch.nonzero(sizes >= 4).flatten()
    drawn = candidates[permutation(len(candidates), key_of(seed, "shown clusters"))[:rows]]
    chosen: list[int] = drawn[sizes[drawn].argsort(descending=True, stable=True)].tolist()
    return chosen


def cluster_cards(
    labels: ClusterLabels, data: DataConfig, shown: Sequence[int], *, columns: int
) -> list[ClusterCard]:
    """The size of each cluster shown, and its first samples with their captions."""
    members = {number: labels.ids[labels.labels == number] for number in shown}
    wanted = {number: ids[:columns].tolist() for number, ids in members.items()}
    samples = _samples(data.train, list(chain.from_iterable(wanted.values())), data)
    return [
        ClusterCard(number, len(members[number]), [samples[i] for i in ids if i in samples])
        for number, ids in wanted.items()
    ]


def retrieval_picture(spec: str, encode: Encode, context: EvalContext) -> Pixels | None:
    """Some images with the five nearest captions; equal captions count as right.

    Collective; drawn on rank 0 from its share of the images, None elsewhere.
    """
    comm = context.comm
    share = embed_images(spec, encode, context, limit=SHOWN_SAMPLES)
    own = [str(record.values.get("txt", "")) for record in share.records]
    texts = sorted(set(chain.from_iterable(comm.gather_json(own))))
    captions = embed_texts(texts, encode, context)
    if not comm.is_main:
        return None
    rows = permutation(len(own), key_of(context.seed, "shown"))[:ROWS]
    nearest = (share.features[rows] @ captions.T).topk(min(5, len(texts))).indices
    ids = [share.records[row].sample_id for row in rows.tolist()]
    samples = _samples(spec, ids, context.data)
    return retrieval_montage(
        [
            (samples[sample][0], [Hit(texts[t], texts[t] == own[row]) for t in found])
            for sample, row, found in zip(ids, rows.tolist(), nearest.tolist(), strict=True)
        ]
    )


def _samples(spec: str, ids: Sequence[int], data: DataConfig) -> dict[int, Sample]:
    """Pixels and caption by sample id; samples that lack or are damaged are left out."""
    shards = ShardSet.open(spec)
    found: dict[int, Sample] = {}
    for place, sample_id in shards.find(ids):
        with suppress(BadSample, DamagedSample):
            found[sample_id] = _sample(shards.read(place).fields, data)
    return found


def _sample(fields: dict[str, bytes], data: DataConfig) -> Sample:
    pixels = decode_image(
        find_image(fields, data.images),
        size=SHOWN_SIZE,
        background=data.background,
        max_pixels=data.max_pixels,
    )
    return pixels.permute(1, 2, 0).numpy(), fields.get("txt", b"").decode(errors="replace")
