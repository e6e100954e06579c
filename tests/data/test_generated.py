"""Generated captions stand beside those of the shards, which stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.streams import open_stream, write_shards
from trainer.config import CaptionConfig
from trainer.data.captions import choose_caption
from trainer.data.generated import GeneratedCaptions, write_generated
from trainer.data.shards import ShardSet
from trainer.errors import DataError

FIELDS = {"txt": b"der  Hund", "generated": b"a dog"}


def chosen(sample: dict[str, bytes], epochs: int = 1, **config) -> list[str]:
    where = CaptionConfig(generated=Path("there"), **config)
    return [
        choose_caption(sample, sample_id=7, epoch=e, seed=0, config=where) for e in range(epochs)
    ]


def test_concat_holds_both_texts_and_without_a_generated_one_the_original():
    both = {"fields": ("txt", "generated"), "combine": "concat"}
    assert chosen(FIELDS, **both) == ["der Hund; a dog"]
    assert chosen({"txt": FIELDS["txt"]}, **both) == ["der Hund"]


def test_a_share_of_the_visits_reads_the_generated_caption():
    found = chosen(FIELDS, 2000, fields=("txt", "generated"), weights=(3, 1))
    assert 420 < found.count("a dog") < 580
    assert found.count("a dog") + found.count("der Hund") == 2000


def test_texts_are_found_by_id_and_an_empty_one_is_a_text(tmp_path):
    texts = {-5: "ä", 3: "", 2**62: "three words here"}
    write_generated(tmp_path, texts, {"by": "hand"}, {})
    found = GeneratedCaptions(tmp_path)
    assert {i: found.of(i) for i in texts} == texts
    assert found.of(4) is None
    assert found.added({"txt": b"x"}, 4) == {"txt": b"x"}


def test_captions_of_other_shards_or_cut_off_are_refused(tmp_path):
    spec = write_shards(tmp_path, [4])
    captions = {"fields": ("txt", "generated"), "generated": tmp_path}
    ids = ShardSet.open(spec).ids.tolist()
    write_generated(tmp_path, dict.fromkeys(ids, "word"), {}, {"000": "another"})
    with pytest.raises(DataError, match="was made of another 000"):
        open_stream(spec, captions=captions)
    write_generated(tmp_path, dict.fromkeys(ids, "word"), {}, {})
    (tmp_path / "texts.bin").write_bytes(b"wo")
    with pytest.raises(DataError, match="not whole"):
        open_stream(spec, global_batch=4, captions=captions).take()
