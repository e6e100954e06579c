"""Pictures of a run in progress, as TensorBoard holds them after a run on two ranks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import run_ranks
from tests.test_loop import config_in
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.pictures.run import cluster_cards
from trainer.programs.workdir_pictures import inspect_workdir

RETRIEVAL = 'evals=[{{name: retrieval, label: captions, data: "{spec}", every: 4 steps}}]'


def trained(comm: Comm, config: RunConfig) -> bool:
    from trainer.loop import train

    return train(config).finished


def test_clusters_and_retrieval_are_drawn_during_training_and_after_it(tmp_path: Path) -> None:
    spec = config_in(tmp_path).data.train
    config = config_in(tmp_path, RETRIEVAL.format(spec=spec), "steps=8")
    assert run_ranks(trained, 2, config) == [True, True]

    board = EventAccumulator(str(config.workdir / "tensorboard"))
    board.Reload()
    assert {"pictures/clusters", "pictures/captions"} <= set(board.Tags()["images"])
    assert [event.step for event in board.Images("pictures/captions")] == [4, 8]
    picture = Image.open(io.BytesIO(board.Images("pictures/clusters")[-1].encoded_image_string))
    assert len(np.unique(np.asarray(picture))) > 50, "drawings have colours"

    written = inspect_workdir(config.workdir)
    assert all(path is not None and path.stat().st_size > 1000 for path in written)


def test_a_card_holds_the_images_of_its_own_cluster(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    shards = ShardSet.open(config.data.train)
    ids = shards.ids
    numbers = torch.arange(len(ids)) % 3
    labels = ClusterLabels.gather(torch.from_numpy(ids.copy()), numbers, Comm.solo())
    (card,) = cluster_cards(labels, config.data, [2], columns=4)
    members = {shards.read(i).fields["txt"].decode() for i in range(len(ids)) if i % 3 == 2}
    assert (card.number, card.size, len(card.samples)) == (2, len(ids[2::3]), 4)
    assert {caption for _, caption in card.samples} <= members
