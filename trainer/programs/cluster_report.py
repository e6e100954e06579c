"""How good a finished clustering is, and what it looks like.

OUT/quality.json    agreement with classes and with another clustering
OUT/clusters.html   sizes, samples with captions, nearest clusters, search by word
OUT/clusters.png    a montage of some, also among OUT/tensorboard's images
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image
from torch import Tensor

from trainer.cluster.quality import adjusted_rand_index, normalized_mutual_information
from trainer.cluster.search.assign import prepare
from trainer.cluster.search.top import nearest
from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.classes import class_labels
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.log.records import TensorBoard
from trainer.pictures.montage import cluster_montage
from trainer.pictures.page import ClusterCard, cluster_page
from trainer.pictures.run import COLUMNS, ROWS, chosen_clusters, cluster_cards
from trainer.programs.cluster import CENTROIDS, read_figures

QUALITY = "quality.json"
_NEIGHBOURS = 6


def measure_quality(
    out: Path,
    comm: Comm,
    *,
    images: str | None = None,
    classes: str | None = None,
    compare: Path | None = None,
) -> dict[str, float]:
    """NMI and ARI of the nearest clusters with a json key of the shards `images`, and with the
    result in `compare` (another seed, say: stability); written by rank 0, known to all."""
    labels = ClusterLabels.open(out)
    first, last = comm.row_range(len(labels))
    ids, own = labels.ids[first:last].to(comm.device), labels.labels[first:last].to(comm.device)
    found: dict[str, float] = {}
    if images is not None and classes is not None:
        found |= _agreement("classes", own, class_labels(images, classes, comm).of(ids), comm)
    if compare is not None:
        found |= _agreement("compared", own, ClusterLabels.open(compare).of(ids), comm)
    if comm.is_main:
        (out / QUALITY).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _agreement(name: str, own: Tensor, other: Tensor, comm: Comm) -> dict[str, float]:
    known = comm.sum((other >= 0).sum()[None])
    return {
        f"nmi_{name}": normalized_mutual_information(own, other, comm),
        f"ari_{name}": adjusted_rand_index(own, other, comm),
        f"samples_{name}": float(known),
    }


def write_page(out: Path, images: str, *, shown: int, seed: int = 0) -> Path:
    """The page of a finished clustering whose samples are in the shards `images`; one rank."""
    everything, data = ClusterLabels.open(out), DataConfig(train=images)
    labels = _within(everything, images)
    numbers = chosen_clusters(labels, rows=shown, seed=seed)
    with safetensors.safe_open(out / CENTROIDS, framework="pt") as file:
        centroids, counts = file.get_tensor("centroids"), file.get_tensor("counts")
    near = _neighbours(centroids, numbers)
    sizes = torch.bincount(everything.labels.long(), minlength=len(counts)).tolist()
    cards = [
        card._replace(nearest=near[card.number], size=sizes[card.number])
        for card in cluster_cards(labels, data, numbers, columns=COLUMNS)
    ]
    figures = {**read_figures(out), **_read_quality(out)}
    page = cluster_page(
        out / "clusters.html",
        cards,
        sizes=sizes,
        title=f"{len(counts)} clusters of {len(everything)} samples",
        figures={k: float(v) for k, v in figures.items() if isinstance(v, int | float)},
    )
    _montage(out, cards[:ROWS])
    _projector(out / "tensorboard", cards, centroids)
    return page


def _within(labels: ClusterLabels, images: str) -> ClusterLabels:
    """The samples that there are pictures of."""
    there = torch.from_numpy(np.isin(labels.ids.numpy(), ShardSet.open(images).ids))
    return ClusterLabels(labels.ids[there], labels.labels[there])


def _neighbours(centroids: Tensor, numbers: list[int]) -> dict[int, list[int]]:
    """Of each of these clusters the nearest others."""
    if not numbers:
        return {}
    found = nearest(centroids[numbers], prepare(centroids), count=_NEIGHBOURS + 1).ids.tolist()
    return {
        number: [other for other in row if other not in (number, -1)][:_NEIGHBOURS]
        for number, row in zip(numbers, found, strict=True)
    }


def _montage(out: Path, cards: list[ClusterCard]) -> None:
    if not cards:
        return
    titles = [f"cluster {card.number}: {card.size} samples" for card in cards]
    pixels = cluster_montage([card.samples for card in cards], titles=titles)
    Image.fromarray(pixels).save(out / "clusters.png")
    board = TensorBoard(out / "tensorboard", first_step=0)
    board.image(0, "clusters", pixels)
    board.close()


def _projector(folder: Path, cards: list[ClusterCard], centroids: Tensor) -> None:
    """Files that TensorBoard's projector reads: a centroid a line, and what to call it."""
    if not cards:
        return
    rows = [centroids[card.number].tolist() for card in cards]
    tensors = ["\t".join(f"{value:.6g}" for value in row) for row in rows]
    names = ["cluster\tsamples\tcaption"]
    for card in cards:
        caption = " ".join(card.samples[0][1].split()) if card.samples else ""
        names.append(f"{card.number}\t{card.size}\t{caption}")
    (folder / "centroids.tsv").write_text("\n".join(tensors) + "\n", encoding="utf-8")
    (folder / "centroid_names.tsv").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "projector_config.pbtxt").write_text(_PROJECTOR, encoding="utf-8")


_PROJECTOR = """embeddings {
  tensor_name: "centroids"
  tensor_path: "centroids.tsv"
  metadata_path: "centroid_names.tsv"
}
"""


def _read_quality(out: Path) -> dict[str, Any]:
    path = out / QUALITY
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
