"""Pictures of a trained run: what its clusters hold, and what its images find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from trainer.cluster.labels import ClusterLabels
from trainer.cluster.montage import Hit, Pixels, Sample, cluster_montage, retrieval_montage
from trainer.cluster.page import ClusterCard, cluster_page
from trainer.comm import Comm
from trainer.data.decode import decode_image, find_image
from trainer.data.shards import ShardSet
from trainer.evals.features import embed_images, embed_texts
from trainer.hashing import key_of, permutation
from trainer.records import TensorBoard
from trainer.run import eval_context
from trainer.workdir import Trained, encoder, open_workdir

SHOWN_SIZE = 96


class Written(NamedTuple):
    """Files that were written; None where the run has nothing of the kind."""

    clusters: Path | None
    page: Path | None
    retrieval: Path | None


def inspect_workdir(workdir: Path, *, rows: int = 8, columns: int = 9) -> Written:
    """Write PNGs, an HTML page and TensorBoard images into the workdir."""
    trained = open_workdir(workdir, Comm.solo())
    board = TensorBoard(workdir / "tensorboard", first_step=trained.restored.step)
    folder = workdir / "pictures"
    folder.mkdir(exist_ok=True)
    clusters = page = retrieval = None
    if labels := _episode_labels(trained):
        shown = _chosen(labels, rows=rows, seed=trained.run.seed)
        cards = list(_cards(trained, labels, shown, columns=columns))
        titles = [f"cluster {card.number}: {card.size} images" for card in cards]
        montage = cluster_montage([card.samples for card in cards], titles=titles)
        clusters = _save(folder / "clusters.png", montage, board, trained.restored.step)
        page = cluster_page(
            folder / "clusters.html",
            list(_cards(trained, labels, _chosen(labels, rows=200, seed=0), columns=columns)),
            sizes=torch.bincount(labels.labels.long()).tolist(),
            title="What the image clusters of the last episode hold",
        )
    if found := _retrieved(trained, rows=rows):
        montage = retrieval_montage(found)
        retrieval = _save(folder / "retrieval.png", montage, board, trained.restored.step)
    board.close()
    return Written(clusters, page, retrieval)


def _episode_labels(trained: Trained) -> ClusterLabels | None:
    """The image clusters of the episode that the checkpoint was written in."""
    ids, labels = (f"episode/labels/image/{field}" for field in ("ids", "labels"))
    if ids not in trained.restored.names("parts"):
        return None
    tensors = dict(trained.restored.tensors("parts"))
    return ClusterLabels(tensors[ids], tensors[labels])


def _chosen(labels: ClusterLabels, *, rows: int, seed: int) -> list[int]:
    """Clusters of four or more, drawn by hash, the largest first."""
    sizes = torch.bincount(labels.labels.long())
    candidates = torch.nonzero(sizes >= 4).flatten()
    drawn = candidates[permutation(len(candidates), key_of(seed, "shown clusters"))[:rows]]
    chosen: list[int] = drawn[sizes[drawn].argsort(descending=True, stable=True)].tolist()
    return chosen


def _cards(
    trained: Trained, labels: ClusterLabels, shown: Sequence[int], *, columns: int
) -> Iterator[ClusterCard]:
    shards = ShardSet.open(trained.run.data.train)
    order = np.argsort(shards.ids)
    for number in shown:
        members = labels.ids[labels.labels == number]
        places = order[np.searchsorted(shards.ids[order], members[:columns].numpy())]
        samples = [_sample(trained, shards.read(int(place)).fields) for place in places]
        yield ClusterCard(number, len(members), samples)


def _sample(trained: Trained, fields: dict[str, bytes]) -> Sample:
    data = trained.run.data
    pixels = decode_image(
        find_image(fields),
        size=SHOWN_SIZE,
        background=data.background,
        max_pixels=data.max_pixels,
    )
    return pixels.permute(1, 2, 0).numpy(), fields.get("txt", b"").decode(errors="replace")


def _retrieved(trained: Trained, *, rows: int) -> list[tuple[Pixels, list[Hit]]]:
    """The five nearest captions of some evaluation images; equal captions count as right."""
    if not trained.run.evals or trained.tokenizer is None:
        return []
    spec = trained.run.evals[0].data
    context = eval_context(trained.run, Comm.solo(), trained.tokenizer)
    encode = encoder(trained.model)
    share = embed_images(spec, encode, context)
    shards = ShardSet.open(spec)
    captions = [_sample(trained, shards.read(i).fields)[1] for i in range(len(shards))]
    texts = sorted(set(captions))
    nearest = (share.features @ embed_texts(texts, encode, context).T).topk(min(5, len(texts)))
    number = {int(sample): i for i, sample in enumerate(shards.ids)}
    found = []
    for row in permutation(len(share.records), key_of(trained.run.seed, "shown"))[:rows].tolist():
        index = number[share.records[row].sample_id]
        hits = [Hit(texts[t], texts[t] == captions[index]) for t in nearest.indices[row].tolist()]
        found.append((_sample(trained, shards.read(index).fields)[0], hits))
    return found


def _save(path: Path, pixels: Pixels, board: TensorBoard, step: int) -> Path:
    Image.fromarray(pixels).save(path)
    board.image(step, path.stem, pixels)
    return path
