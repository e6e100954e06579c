"""Generated captions stand beside those of the shards, which stay as they are."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from tests.data.streams import open_stream, write_shards
from trainer.config import CaptionConfig
from trainer.data.captions import choose_caption
from trainer.data.generated import GeneratedCaptions, write_generated, write_parts
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


@pytest.mark.heavy
def test_captions_in_parts_are_the_bytes_of_all_at_once_and_never_in_memory_together(tmp_path):
    def part(number: int) -> dict[int, str]:
        ids = range(number - 500, 4000 - 500, 8)
        return {i * (-1) ** i: f"ä{i} " * 200 for i in ids}

    whole = {i: text for number in range(8) for i, text in part(number).items()}
    parts = [partial(part, number) for number in range(8)]
    for name in ("parts", "whole"):
        (tmp_path / name).mkdir()
    tracemalloc.start()
    assert write_parts(tmp_path / "parts", parts, {"by": "hand"}, {}) == 4000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < sum(len(text) for text in whole.values()) / 3
    write_generated(tmp_path / "whole", whole, {"by": "hand"}, {})
    for name in ("captions.json", "ids.npy", "starts.npy", "texts.bin"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    found = GeneratedCaptions(tmp_path / "parts")
    assert all(found.of(i) == text for i, text in list(whole.items())[::97])
    with pytest.raises(DataError, match="two captions are of sample 3"):
        write_parts(tmp_path / "parts", [lambda: {3: "a"}, lambda: {3: "b"}], {}, {})
    assert write_parts(tmp_path / "parts", [], {}, {}) == 0


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
