"""Retrieval by other captions and languages, by stored vectors, and what a model can't read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.evals.rank_cases import setting
from tests.evals.test_sets import png_of, random_pictures, share_of, write_set
from tests.fixtures.vectors import write_vectors
from tests.models.small import word_tokenizer
from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.data.tokenize import train_tokenizer
from trainer.errors import DataError
from trainer.evals import run_eval
from trainer.evals.features import embed_images
from trainer.evals.pairing import texts_of, with_text
from trainer.evals.retrieval import percent_unread, stored_texts
from trainer.evals.table import table_rows

SOLO = Comm.solo()
TEXTS = {"en": "name {}", "de": "Name {}", "zh": "名字{}"}


def spec_in(folder: Path, count: int = 12) -> str:
    pictures = random_pictures(count, seed=0)
    samples = [
        (
            png_of(picture),
            {
                "concept_id": str(number),
                "long": f"a long text about {number}",
                "lang": {language: text.format(number) for language, text in TEXTS.items()},
            },
        )
        for number, picture in enumerate(pictures)
    ]
    return write_set(folder / "set.tar", samples)


def config(name: str, spec: str, **values: object) -> EvalConfig:
    return EvalConfig.model_validate({"name": name, "label": "x", "data": spec} | values)


def test_a_text_is_found_under_any_key() -> None:
    share = share_of(
        {"txt": " a  b ", "long": "c", "lang": {"de": "d"}, "words": ["e", "f"], "x.y": "g"}, {}
    )
    record = share.records[0]
    keys = ("txt", "long", "lang.de", "lang.fr", "words", "x.y", "lang", "none.at.all")
    found = [texts_of(record, key) for key in keys]
    assert found == [["a b"], ["c"], ["d"], [], ["e", "f"], ["g"], [], []]
    assert len(with_text(share, "lang.de", spec="s", comm=SOLO).records) == 1
    with pytest.raises(DataError, match=r"no sample of s has a text under 'lang.fr'"):
        with_text(share, "lang.fr", spec="s", comm=SOLO)


def test_each_language_is_the_retrieval_of_its_own_captions(tmp_path: Path) -> None:
    """Names all equal ("a name") are one text; long texts and languages have one each."""
    spec = spec_in(tmp_path)
    encode, context = setting(SOLO, spec)
    assert run_eval(config("retrieval", spec), encode, context)["texts"] == 1.0
    long = run_eval(config("retrieval", spec, caption="long"), encode, context)
    assert long["texts"] == long["samples"] == 12.0
    found = run_eval(config("cross_lingual", spec), encode, context)
    assert found["languages"] == 3.0
    for language in TEXTS:
        own = run_eval(config("retrieval", spec, caption=f"lang.{language}"), encode, context)
        assert {name: found[f"{name}/{language}"] for name in own} == own
    mean = sum(found[f"text_to_image_r5/{language}"] for language in TEXTS) / 3
    assert found["text_to_image_r5"] == pytest.approx(mean)
    chosen = run_eval(config("cross_lingual", spec, languages=["de"]), encode, context)
    assert chosen["image_to_text_r1"] == found["image_to_text_r1/de"]
    rows = table_rows({"languages": found})
    assert [row.label for row in rows].count("languages") == 1
    by_figure = {row.figure: row for row in rows}
    assert len(by_figure) == 4 * 6
    assert by_figure["image_to_text_r1/zh"].chance == pytest.approx(100 / 12)
    assert "unread" in by_figure["image_to_text_r1/zh"].remarks
    with pytest.raises(DataError, match=r"has texts by language under 'tongue'"):
        run_eval(config("cross_lingual", spec, caption="tongue"), encode, context)


def test_stored_vectors_stand_for_the_texts(tmp_path: Path) -> None:
    """Vectors that are the images' own features give perfect retrieval, the model reads nothing."""
    spec = spec_in(tmp_path)
    encode, context = setting(SOLO, spec)
    share = embed_images(spec, encode, context)
    store = write_vectors(tmp_path / "store", spec, vectors=3, dim=share.features.shape[1])
    entry = config("retrieval", spec, caption="long", text_store=store.folder, text_vectors=[2, 0])
    ids = [record.sample_id for record in share.records]
    vectors = store.vectors(torch.tensor(ids), [0, 2]).mean(1)
    expected = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(stored_texts(ids, entry, context), expected)
    blind = context._replace(tokenizer=None)
    found = run_eval(entry, encode, blind)
    assert "unread" not in found
    scores = torch.nn.functional.normalize(share.features, dim=1) @ expected.T
    right = (scores.argmax(1) == torch.arange(12)).float().mean() * 100
    assert found["image_to_text_r1"] == pytest.approx(float(right))


def test_what_can_not_be_read_shows() -> None:
    """Bytes of a script that the tokenizer never saw; unknown words; plain English."""
    english = train_tokenizer(
        ["the name of a thing", "things and names"] * 5, vocab_size=280, length=40
    )
    assert percent_unread(["the name"], english, 40) == 0.0
    assert percent_unread(["名字"], english, 40) == 100.0
    assert 0.0 < percent_unread(["der Name für Dinge"], english, 40) < 30.0
    words = word_tokenizer()
    words.unk_token = "[pad]"
    assert percent_unread(["word1 word2"], words, 12) == 0.0
    assert percent_unread(["word1 straße"], words, 12) == 50.0
