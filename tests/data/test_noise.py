"""Noise moves exactly the chosen samples' texts, loses none, and leaves none in its place."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
import torch
from pydantic import ValidationError

from tests.fixtures.emoji import write_shards
from trainer.comm import Comm
from trainer.config import DataConfig, NoiseConfig
from trainer.data.classes import named_classes
from trainer.data.noise import NoisyShards, trained_on
from trainer.data.shards import ShardSet

IMAGES = ("png", "jpg")


@pytest.fixture
def shards(tmp_path):
    return ShardSet.open(write_shards(tmp_path / "data", count=200, per_shard=20))


def noisy(shards, share, **more):
    return NoisyShards.over(shards, NoiseConfig(share=share, **more), IMAGES)


@pytest.mark.heavy
@pytest.mark.parametrize("group_shards", [1, 3, 10, 99])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_texts_are_moved_within_their_group_and_none_is_lost(shards, share, group_shards):
    view = noisy(shards, share, group_shards=group_shards)
    sources = [view.source_of(index) for index in range(len(shards))]
    assert sorted(sources) == list(range(len(shards)))
    for index, source in enumerate(sources):
        assert shards.locate(index)[0] // group_shards == shards.locate(source)[0] // group_shards
    moved = sum(index != source for index, source in enumerate(sources))
    assert moved == pytest.approx(200 * share, abs=20)
    texts = [view.read(index).fields["txt"] for index in range(len(shards))]
    plain = [shards.read(index).fields["txt"] for index in range(len(shards))]
    assert Counter(texts) == Counter(plain)
    assert texts == [plain[source] for source in sources]


def test_the_chosen_set_is_that_of_the_hash_and_grows_with_the_share(shards):
    moved = {}
    for share in (0.1, 0.2, 0.3):
        view = noisy(shards, share, group_shards=99)
        moved[share] = {i for i in range(200) if view.source_of(i) != i}
    assert moved[0.1] < moved[0.2] < moved[0.3]
    other = noisy(shards, 0.1, group_shards=99, seed=1)
    assert {i for i in range(200) if other.source_of(i) != i} != moved[0.1]


def test_an_image_and_an_id_stay_and_everything_else_comes_from_one_other_sample(shards):
    view = noisy(shards, 1.0)
    for index in (0, 57, 199):
        own, source, found = shards.read(index), view.source_of(index), view.read(index)
        assert source != index
        assert (found.sample_id, found.key, found.shard) == (own.sample_id, own.key, own.shard)
        assert found.fields["png"] == own.fields["png"]
        other = shards.read(source).fields
        assert {k: v for k, v in found.fields.items() if k != "png"} == {
            k: v for k, v in other.items() if k != "png"
        }
        assert json.loads(found.fields["json"]) != json.loads(own.fields["json"])


def test_classes_of_a_json_key_move_with_the_texts(shards):
    """As a recipe with `classes` reads them: 40 % have another sample's, and none is lost."""
    data = DataConfig(train="::".join(shards.shards), noise=NoiseConfig(share=0.4))
    clean, names = named_classes(shards, "concept", Comm.solo())
    moved, same = named_classes(trained_on(data), "concept", Comm.solo())
    assert names == same
    view = noisy(shards, 0.4)
    for index in range(len(shards)):
        own, source = (shards.ids[[place]] for place in (index, view.source_of(index)))
        assert moved.of(torch.as_tensor(own)) == clean.of(torch.as_tensor(source))
    assert Counter(moved.labels.tolist()) == Counter(clean.labels.tolist())
    count = sum(view.source_of(index) != index for index in range(len(shards)))
    assert 0 < int((moved.of(clean.ids) != clean.of(clean.ids)).sum()) <= count


def test_a_worker_process_sees_the_same(shards):
    view = noisy(shards, 0.5, group_shards=3)
    again = pickle.loads(pickle.dumps(view))
    for index in (3, 150, 42):
        assert again.read(index) == view.read(index)


def test_noise_is_only_for_the_reader_that_can_do_it():
    with pytest.raises(ValidationError, match="noise is not read where reader is webdataset"):
        DataConfig(train="x", reader="webdataset", noise={"share": 0.1})
    with pytest.raises(ValidationError, match="seed is not read where share is 0"):
        NoiseConfig(seed=3)
