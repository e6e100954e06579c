"""The pairs that travel with the repository are real and readable."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.fixtures.emoji import read_pairs, write_shards
from trainer.data.shards import ShardSet


@pytest.mark.parametrize(("count", "per_shard", "sizes"), [(200, 50, (50,) * 4), (7, 3, (3, 3, 1))])
def test_shards_hold_the_pairs(
    tmp_path: Path, count: int, per_shard: int, sizes: tuple[int, ...]
) -> None:
    shards = ShardSet.open(write_shards(tmp_path, count=count, per_shard=per_shard))
    assert shards.sizes == sizes
    assert len(set(shards.ids.tolist())) == count
    for number, pair in enumerate(read_pairs(count)):
        sample = shards.read(number)
        assert sample.fields["png"] == pair["png"]
        assert sample.fields["txt"].decode() == pair["name"]
        assert int(sample.fields["cls"]) == json.loads(sample.fields["json"])["class_id"]


def test_pictures_are_small_drawings_of_twenty_kinds() -> None:
    pairs = read_pairs()
    assert {Image.open(io.BytesIO(pair["png"])).size for pair in pairs} == {(72, 72)}
    assert set(Counter(pair["subgroup"] for pair in pairs).values()) == {10}
    assert len({pair["class_id"] for pair in pairs}) == 200
    assert len({pair["subgroup_id"] for pair in pairs}) == 20


def test_more_pairs_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="200 pictures"):
        read_pairs(201)
