"""The pictures of a trained run, as files and in its TensorBoard log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from trainer.comm import Comm
from trainer.data.labels import ClusterLabels
from trainer.log.files import PICTURES
from trainer.log.records import TensorBoard
from trainer.pictures.montage import Pixels
from trainer.pictures.page import cluster_page
from trainer.pictures.run import (
    COLUMNS,
    chosen_clusters,
    cluster_cards,
    clusters_picture,
    retrieval_picture,
)
from trainer.programs.workdir import Trained, encoder, open_workdir
from trainer.run import eval_context

PAGE_ROWS = 200
"""Clusters on the page, at most."""


class Written(NamedTuple):
    """Files that were written; None where the run has nothing of the kind."""

    clusters: Path | None
    page: Path | None
    retrieval: Path | None


def inspect_workdir(workdir: Path, overrides: Sequence[str] = ()) -> Written:
    """Write PNGs, an HTML page and TensorBoard images into the workdir."""
    trained = open_workdir(workdir, Comm.solo(), overrides)
    run, step = trained.run, trained.restored.step
    board = TensorBoard(workdir / "tensorboard", first_step=step)
    folder = workdir / "pictures"
    folder.mkdir(exist_ok=True)
    clusters = page = retrieval = None
    if labels := _episode_labels(trained):
        picture = clusters_picture(labels, run.data, seed=run.seed)
        clusters = _save(folder / "clusters.png", picture, board, step)
        shown = chosen_clusters(labels, rows=PAGE_ROWS, seed=0)
        page = cluster_page(
            folder / "clusters.html",
            cluster_cards(labels, run.data, shown, columns=COLUMNS),
            sizes=torch.bincount(labels.labels.long()).tolist(),
            title="What the image clusters of the last episode hold",
        )
    if run.evals and trained.tokenizer is not None:
        context = eval_context(run, Comm.solo(), trained.tokenizer)
        found = retrieval_picture(run.evals[0].data, encoder(trained.model), context)
        assert found is not None
        retrieval = _save(folder / "retrieval.png", found, board, step)
    board.close()
    return Written(clusters, page, retrieval)


def _episode_labels(trained: Trained) -> ClusterLabels | None:
    """The image clusters of the episode that the checkpoint was written in."""
    ids, labels = (f"episode/labels/image/{field}" for field in ("ids", "labels"))
    if ids not in trained.restored.names("parts"):
        return None
    tensors = dict(trained.restored.tensors("parts"))
    return ClusterLabels(tensors[ids], tensors[labels])


def _save(path: Path, pixels: Pixels, board: TensorBoard, step: int) -> Path:
    Image.fromarray(pixels).save(path)
    board.image(step, PICTURES + path.stem, pixels)
    return path
