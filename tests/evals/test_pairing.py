"""Which pictures and texts a retrieval set has, and which are right, by the protocol's words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.evals.rank_cases import setting
from tests.evals.test_sets import png_of, random_pictures, share_of, write_set
from tests.fixtures.vectors import write_vectors
from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.errors import ConfigError
from trainer.evals import run_eval
from trainer.evals.features import Share
from trainer.evals.pairing import Pairs, paired, texts_of
from trainer.evals.retrieval import chances
from trainer.evals.samples import Record

SOLO = Comm.solo()


def right(pairs: Pairs) -> list[list[bool]]:
    return [[bool(shown & named) for named in pairs.named] for shown in pairs.pictures]


def test_pairs_by_concept_and_picture_but_not_through_others() -> None:
    share = share_of(
        {"txt": "red apple", "concept_id": "apple"},
        {"txt": "apple", "concept_id": "apple", "pix": "same"},
        {"txt": "  tomato ", "concept_id": "tomato", "pix": "same"},
        {"txt": "tomato", "concept_id": "tomato"},
        {"txt": "plum"},
    )
    pairs = paired(share, SOLO)
    assert pairs.texts == ["red apple", "apple", "tomato", "plum"]
    assert pairs.samples == [0, 1, 2, 4]
    assert pairs.own == [0, 1, 3, 4]  # one drawing of two names is one picture
    assert right(pairs) == [
        [True, True, False, False],
        [True, True, True, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    expected = sum(map(sum, right(pairs))) / 16 * 100
    found = chances(pairs.pictures, pairs.named, cutoffs=[1])[1]
    assert found == pytest.approx(expected)


def test_every_caption_is_a_text_of_its_own_picture() -> None:
    """Also one that two pictures share, or that a picture has twice: so the protocol counts."""
    share = share_of(
        {"captions": ["a dog", " a  cat ", ""]},
        {"captions": ["a dog", "a dog"]},
        {"captions": "one line\n\n another\r\n"},
        {"captions": 7},
    )
    pairs = paired(share, SOLO, caption="captions")
    assert pairs.texts == ["a dog", "a cat", "a dog", "a dog", "one line", "another"]
    assert [[i for i, ok in enumerate(row) if ok] for row in right(pairs)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [],
    ]
    assert texts_of(Record(0, {"lang": {"de": ["x", None, "y"]}}), "lang.de") == ["x", "y"]


@pytest.mark.parametrize("stated", [True, False])
def test_samples_of_one_picture_are_one_query_with_all_their_captions(stated: bool) -> None:
    """By a stated key, or by the bytes; a list that every copy repeats is not counted again."""
    records = [
        Record(
            number,
            {"captions": [f"c{number}", "of all"]} | ({"image_id": number % 2} if stated else {}),
            "" if stated else f"digest {number % 2}",
        )
        for number in range(6)
    ]
    share = Share(torch.zeros(6, 2), records)
    pairs = paired(share, SOLO, caption="captions", picture="image_id")
    assert pairs.own == [0, 1]
    assert pairs.num_samples == 6
    of_each = [[pairs.texts[i] for i, ok in enumerate(row) if ok] for row in right(pairs)]
    assert of_each == [["c0", "of all", "c2", "c4"], ["c1", "of all", "c3", "c5"]]
    assert pairs.texts.count("of all") == 2


def test_equal_bytes_are_one_picture_in_the_whole_evaluation(tmp_path: Path) -> None:
    """One sample a caption, or one sample with a list of captions: the same figures."""
    pictures = [png_of(picture) for picture in random_pictures(9, seed=4)]
    captions = [[f"text {7 * i + 3 * j} of {i}" for j in range(5)] for i in range(9)]
    lists = [(png, {"c": texts}) for png, texts in zip(pictures, captions, strict=True)]
    single = [(png, {"c": text}) for png, values in lists for text in values["c"]]
    config = EvalConfig(name="retrieval", label="r", data="", caption="c")
    found = []
    for name, samples in (("lists", lists), ("single", single)):
        spec = write_set(tmp_path / f"{name}.tar", samples)
        encode, context = setting(SOLO, spec)
        found.append(run_eval(config.model_copy(update={"data": spec}), encode, context))
    assert found[0].pop("samples") == 9
    assert found[1].pop("samples") == 45
    assert found[0] == found[1]
    assert (found[0]["pictures"], found[0]["texts"]) == (9, 45)
    assert found[0]["chance_text_to_image_r1"] == pytest.approx(100 / 9)


def test_a_store_by_sample_can_not_tell_captions_apart(tmp_path: Path) -> None:
    picture = png_of(random_pictures(1, seed=0)[0])
    spec = write_set(tmp_path / "set.tar", [(picture, {"c": ["one", "two"]})])
    encode, context = setting(SOLO, spec)
    store = write_vectors(tmp_path / "store", spec, vectors=1, dim=24)
    config = EvalConfig(
        name="retrieval", label="r", data=spec, caption="c", text_store=store.folder
    )
    with pytest.raises(ConfigError, match=r"has 2 texts under 'c'.*one sample per caption"):
        run_eval(config, encode, context)
