"""Text and json that can't be used: a bad sample to every reader, never an error of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.tars import write_tar
from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.captions import choose_caption, field_texts
from trainer.data.classes import class_labels
from trainer.data.decode import BadSample
from trainer.data.fields import json_of, text_of
from trainer.data.index import write_index
from trainer.data.vocabulary import captions_of
from trainer.errors import DataError
from trainer.evals.samples import values_of

BAD_JSON = {
    "half a pair, escaped": b'{"name": "cup \\ud83d"}',
    "half a pair, in bytes": b'{"name": "cup \xed\xa0\xbd"}',
    "half a pair, in UTF-16": '{"name": "a"}'.encode("utf-16-le")[:-5] + b"\x3d\xd8\x22\0}\0",
    "deep lists": b'{"name": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a number of 5000 digits": b'{"name": "a", "size": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "a NUL byte": b'{"name": "a\0"}',
    "a list": b'["name"]',
    "a text": b'"name"',
    "a number": b"5",
    "nothing": b"null",
    "cut": b'{"name": "a',
}
BAD_TEXT = {"not UTF-8": b"\xff\xfea", "half a pair": b"a\xed\xa0\xbd", "a NUL": b"a\0b"}
CAPTIONS = {"fields": ["name"]}


def caption(fields: dict[str, bytes], name: str) -> str:
    config = DataConfig(train="x.tar", captions={"fields": [name]}).captions
    return choose_caption(fields, sample_id=1, epoch=0, seed=0, config=config)


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_a_bad_sample_to_training_teachers_and_evaluations(data: bytes) -> None:
    for read in (
        lambda f: caption(f, "name"),
        lambda f: field_texts(f, "name") or caption(f, "name"),
        values_of,
    ):
        with pytest.raises(BadSample):
            read({"json": data})


@pytest.mark.parametrize("data", BAD_TEXT.values(), ids=BAD_TEXT)
def test_a_bad_text_is_a_bad_sample_to_training_teachers_and_evaluations(data: bytes) -> None:
    for read in (lambda f: caption(f, "txt"), lambda f: field_texts(f, "txt"), values_of):
        with pytest.raises(BadSample):
            read({"txt": data})


def test_what_json_allows_is_read() -> None:
    emoji = {"name": "cup \N{HOT BEVERAGE} \U0001f600"}
    for text in (json.dumps(emoji), json.dumps(emoji, ensure_ascii=False)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            assert json_of({"json": text.encode(encoding)}) == emoji
            assert caption({"json": text.encode(encoding)}, "name") == emoji["name"]
    assert json_of({}) == json_of({"json": b""}) == {}
    assert text_of({"txt": b"\xc3\xb1"}, "txt") == "ñ"
    # A caption is not lost for what another program left under a key that nobody reads.
    assert caption({"json": b'{"name": "cup", "exif": "\\ud83d \\u0000"}'}, "name") == "cup"


def test_words_are_learnt_and_classes_numbered_without_the_bad_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {f"g{n}": {"json": json.dumps({"name": f"name {n}"}).encode()} for n in range(3)}
    bad = {f"x{n}": {"json": data} for n, data in enumerate(BAD_JSON.values())}
    flipped = {"z": {"json": b'{"name": "flipped"}'}}
    shard = Path(write_tar(tmp_path / "a.tar", good | bad | flipped))
    write_index(str(shard))
    shard.write_bytes(shard.read_bytes().replace(b"flipped", b"Flipped"))
    data = DataConfig(train=str(shard), captions=CAPTIONS)
    expected = ["name 0", "name 1", "name 2"]
    assert sorted(captions_of(data, seed=0, most=100)) == expected
    labels = class_labels(str(shard), "name", Comm.solo())
    said = capsys.readouterr().err
    assert f"{len(bad) + 1} of {len(bad) + 4} samples have no class under 'name'" in said
    assert "a.tar x0: " in said
    count = (len(bad) + 1) / (len(bad) + 4)
    class_labels(str(shard), "name", Comm.solo(), budget=count)
    with pytest.raises(DataError, match=r"more than data\.bad_sample_budget = 0\.01; the first"):
        class_labels(str(shard), "name", Comm.solo(), budget=0.01)
    assert labels.labels.sort().values.tolist() == [0, 1, 2]
