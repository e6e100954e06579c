"""Captions: drawn by weight, by hash, never empty."""

import json

import pytest
import torch

from trainer.config import CaptionConfig
from trainer.data.captions import MAX_CHARACTERS, choose_caption, field_texts
from trainer.data.decode import BadSample
from trainer.evals.pairing import texts_of
from trainer.evals.samples import Record, values_of
from trainer.hashing import key_of, uniform


def choose(data: dict[str, bytes], sample_id: int = 1, epoch: int = 0, seed: int = 0, **config):
    return choose_caption(
        data, sample_id=sample_id, epoch=epoch, seed=seed, config=CaptionConfig(**config)
    )


def sample(txt: str | None = None, **record: object) -> dict[str, bytes]:
    fields = {"json": json.dumps(record).encode()} if record else {}
    return fields if txt is None else {**fields, "txt": txt.encode()}


def test_text_comes_with_its_white_space_collapsed():
    assert choose(sample(" a red \tapple  ")) == "a red apple"
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


def test_every_line_of_a_text_is_a_caption_and_they_are_those_that_retrieval_searches_for():
    text = "a dog\n\n  a  brown dog \r\nan animal\n"
    for fields, name in ((sample(text), "txt"), (sample(long=text), "long")):
        drawn = [choose(fields, sample_id=n, fields=(name,)) for n in range(3000)]
        searched = texts_of(Record(0, values_of(fields)), name)
        assert searched == ["a dog", "a brown dog", "an animal"]
        assert set(drawn) == set(searched)
        for line in searched:
            assert abs(drawn.count(line) - 1000) < 130
    # an item of a list is one caption, whatever lines it has
    assert choose(sample(captions=["one\ntwo"]), fields=("captions",)) == "one two"
    assert texts_of(Record(0, {"captions": ["one\ntwo"]}), "captions") == ["one two"]
    assert field_texts(sample(text), "txt") == ["a dog a brown dog an animal"]  # of a teacher


def test_a_member_is_a_field_by_its_name_before_a_json_key_is():
    fields = {"outputs.txt": b"words", "caption": b"a member", **sample(caption="a key", only="k")}
    assert choose(fields, fields=("outputs.txt",)) == "words"
    assert choose(fields, fields=("Outputs.TXT",)) == "words"
    assert choose(fields, fields=("caption",)) == "a member"
    assert choose(fields, fields=("only",)) == "k"
    assert choose(fields) == "words"  # no member is called txt, and only one ends in it
    assert choose({"caption": b"x", "json": b"{broken"}, fields=("caption",)) == "x"
    assert field_texts(fields, "outputs.txt") == ["words"]
    values = values_of(fields | {"npy": b"\xff\0", "input.jpg": b"\xff"})
    assert texts_of(Record(0, values), "outputs.txt") == texts_of(Record(0, values), "txt")
    assert values == {"outputs.txt": "words", "txt": "words", "caption": "a member", "only": "k"}
    for name in ("json", "nothing", "outputs"):
        with pytest.raises(BadSample, match="no caption"):
            choose(fields, fields=(name,))
    with pytest.raises(BadSample, match=r"a\.txt and b\.txt could all be the txt"):
        choose({"a.txt": b"a", "b.txt": b"b"})
    assert choose({"a.txt": b"a", "b.txt": b"b"}, fields=("b.txt",)) == "b"


@pytest.mark.parametrize(
    "wrong",
    [{"fields": ()}, {"weights": (0.0,)}, {"weights": (-1.0,)}, {"weights": (1.0, 1.0)}],
)
def test_fields_that_can_never_give_a_caption_are_refused(wrong):
    with pytest.raises(ValueError, match=r"CaptionConfig"):
        CaptionConfig(**wrong)


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
