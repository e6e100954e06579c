"""The episode benchmark runs the real recipe and its growth figures follow from its seconds."""

from __future__ import annotations

import math

from tests.fixtures import emoji
from tests.ranks import run_ranks
from trainer.bench.episode import PHASES, EpisodeCase, run
from trainer.comm import Comm
from trainer.models.two_tower import HeadConfig, TowerConfig, TwoTowerConfig

TOWER = TowerConfig(width=32, layers=1, heads=2)
CASE = EpisodeCase(
    model=TwoTowerConfig(
        image_size=32,
        patch_size=16,
        text_length=8,
        vocabulary=300,
        embed_dim=16,
        image=TOWER,
        text=TOWER,
        head=HeadConfig(hidden=24, dim=8),
    ),
    global_batch=8,
    timed_steps=1,
    rounds=1,
)


def episodes(comm: Comm, shards: str) -> list[dict]:
    return run(shards, samples=(16, 32), clusters=(3, 6), case=CASE)


def test_a_row_for_every_size_and_every_number_of_clusters(tmp_path):
    shards = emoji.write_shards(tmp_path, count=40, per_shard=20)
    (rows,) = run_ranks(episodes, 1, shards)
    assert [(row["samples"], row["clusters"]) for row in rows] == [(16, 3), (32, 3), (32, 6)]
    for row in rows:
        assert all(row[f"{phase}_seconds"] >= 0 for phase in PHASES)
        assert row["extract_seconds"] > 0
        assert row["train_seconds"] > 0
    first, second, _ = rows
    assert first["train_growth"] is None
    ratio = second["train_seconds"] / first["train_seconds"]
    assert math.isclose(second["train_growth"], math.log2(ratio), abs_tol=0.006)
