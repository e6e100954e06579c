"""Captions: drawn by weight, by hash, never empty."""

import json

import pytest
import torch

from trainer.config import CaptionConfig
from trainer.data.captions import MAX_CHARACTERS, choose_caption
from trainer.data.decode import BadSample
from trainer.hashing import key_of, uniform


def choose(data: dict[str, bytes], sample_id: int = 1, epoch: int = 0, seed: int = 0, **config):
    return choose_caption(
        data, sample_id=sample_id, epoch=epoch, seed=seed, config=CaptionConfig(**config)
    )


def sample(txt: str | None = None, **record: object) -> dict[str, bytes]:
    fields = {"json": json.dumps(record).encode()} if record else {}
    return fields if txt is None else {**fields, "txt": txt.encode()}


def test_text_comes_with_its_white_space_collapsed():
    assert choose(sample(" a red\n\tapple  ")) == "a red apple"
    assert choose(sample("苹果 ñ")) == "苹果 ñ"


def test_a_list_gives_every_item_its_share():
    fields = sample(keywords=["one", "two", "three", ""])
    drawn = [choose(fields, sample_id=name, fields=("keywords",)) for name in range(3000)]
    for word in ("one", "two", "three"):
        assert abs(drawn.count(word) - 1000) < 130
    assert set(drawn) == {"one", "two", "three"}


def test_fields_are_drawn_by_weight_among_those_the_sample_has():
    config = {"fields": ("txt", "alias", "gloss"), "weights": (1.0, 3.0, 0.0)}
    both = sample("t", alias="a", gloss="g")
    drawn = [choose(both, sample_id=name, **config) for name in range(4000)]
    assert abs(drawn.count("a") - 3000) < 140
    assert drawn.count("g") == 0
    assert choose(sample("t", gloss="g"), **config) == "t"
    with pytest.raises(BadSample, match="no caption"):
        choose(sample(gloss="g"), **config)


def test_the_draw_depends_on_sample_epoch_and_seed_alone():
    fields = sample(keywords=[str(number) for number in range(1000)])
    config = {"fields": ("keywords",)}
    first = choose(fields, sample_id=5, **config)
    assert first == choose(fields, sample_id=5, **config)
    changed = [
        choose(fields, sample_id=6, **config),
        choose(fields, sample_id=5, epoch=1, **config),
        choose(fields, sample_id=5, seed=1, **config),
    ]
    assert len({first, *changed}) == 4
    draw = uniform(torch.tensor([5]), key_of(0, "caption"), 0, 1)
    assert first == str(int(draw * 1000))


def test_keys_within_keys():
    fields = sample(lang={"de": "Apfel", "fr": ["pomme"]}, **{"a.b": "plain"})
    assert choose(fields, fields=("lang.de",)) == "Apfel"
    assert choose(fields, fields=("lang.fr",)) == "pomme"
    assert choose(fields, fields=("a.b",)) == "plain"
    for missing in ("lang", "lang.xx", "lang.de.more", "nothing"):
        with pytest.raises(BadSample, match="no caption"):
            choose(fields, fields=(missing,))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"txt": b""},
        {"txt": b" \n\t "},
        {"txt": b"\xff\xfe"},
        {"png": b"x"},
    ],
)
def test_samples_without_text_are_refused(fields):
    with pytest.raises(BadSample):
        choose(fields)


@pytest.mark.parametrize("data", [b"{", b"[1, 2]", b'{"name": 5}', b'{"name": null}', b'"name"'])
def test_json_that_holds_no_text_is_refused(data):
    with pytest.raises(BadSample):
        choose({"json": data}, fields=("name",))


def test_very_long_texts_are_cut():
    assert len(choose(sample("ab " * 100_000))) <= MAX_CHARACTERS
