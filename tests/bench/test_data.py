"""The reader benchmark runs and says what it compares; how fast is not a test's business."""

from __future__ import annotations

import gc

import pytest

from tests.fixtures import emoji
from trainer.bench.data import run


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to gc
def test_two_rows_with_ratios(tmp_path):
    rows = run(emoji.write_shards(tmp_path, count=20, per_shard=10), seconds=0.01, size=16)
    gc.collect()
    assert [row["reader"] for row in rows] == ["indexed", "webdataset"]
    assert rows[1]["ratio_to_webdataset"] == 1.0
    assert all(row["samples_per_second_per_core"] > 0 for row in rows)
