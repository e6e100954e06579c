"""Text and json that can't be used: a bad sample to every reader, never an error of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.data.tars import write_tar
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.data.captions import choose_caption, field_texts
from trainer.data.classes import class_labels
from trainer.data.decode import BadSample
from trainer.data.fields import json_of, text_of
from trainer.data.index import write_index
from trainer.data.shards import ShardSet
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


def test_classes_are_read_out_of_the_json_alone_and_are_the_same_on_any_ranks(
    tmp_path: Path,
) -> None:
    samples = {
        f"k{n:02d}": {"png": b"\x89" * 5000, "json": json.dumps({"name": f"c{n % 3}"}).encode()}
        for n in range(11)
    }
    shard = Path(write_tar(tmp_path / "a.tar", samples))
    write_index(str(shard))
    alone = class_labels(str(shard), "name", Comm.solo())
    assert alone.of(torch.as_tensor(ShardSet.open(str(shard)).ids)).tolist() == [
        n % 3 for n in range(11)
    ]
    read: list[int] = []
    pread = os.pread
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "pread", lambda *of: read.append(of[1]) or pread(*of))
        class_labels(str(shard), "name", Comm.solo(), budget=0.0)
    assert sum(read) < 11 * 1200  # a header and a few letters each, of 5,000 bytes a sample
    for ids, labels in run_ranks(labels_of_rank, 3, str(shard)):
        assert torch.equal(ids, alone.ids)
        assert torch.equal(labels, alone.labels)


def labels_of_rank(comm: Comm, shard: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = class_labels(shard, "name", comm)
    return found.ids, found.labels


def test_words_are_learnt_from_few_shards_where_there_are_more_captions_than_needed(
    tmp_path: Path,
) -> None:
    for number in range(30):
        texts = {f"k{n}": {"txt": f"word {number}-{n}".encode()} for n in range(10)}
        write_index(write_tar(tmp_path / f"{number:02d}.tar", texts))
    data = DataConfig(train=f"{tmp_path}/*.tar")
    found = list(captions_of(data, seed=1, most=20))
    assert len(set(found)) == 20
    assert len({text.split("-")[0] for text in found}) <= 9  # four times as many samples, and one
    assert found == list(captions_of(data, seed=1, most=20))
    assert found != list(captions_of(data, seed=2, most=20))
    assert len(list(captions_of(data, seed=1, most=1000))) == 300
