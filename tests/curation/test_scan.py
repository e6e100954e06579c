"""One pass over shards: the same bytes on any number of ranks and after any kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.curation.corpus import BAD, SIZES, pair, picture, questions, write_corpus
from tests.data.tars import write_tar
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.concepts.counts import Counts
from trainer.curation import scan as scanning
from trainer.curation.repeats import find_repeats, read_repeats
from trainer.curation.rows import open_rows
from trainer.curation.scan import scan, short_hash
from trainer.data.index import write_index
from trainer.data.shards import ShardSet
from trainer.errors import DataError
from trainer.store import EmbeddingStore


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("scan") / "data")


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    scan(spec, out, questions(), Comm.solo())
    return out


def test_bad_samples_are_in_the_ledger_and_out_of_the_denominators(spec, whole):
    totals = json.loads((whole / "scan.json").read_text())
    usable = sum(SIZES) - len(BAD)
    assert totals["samples"] == {"usable": usable, **dict.fromkeys(BAD.values(), 1)}
    lines = [
        json.loads(line)
        for path in sorted((whole / "ledger").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert [line["key"] for line in lines] == ["002", "010", "016"]
    assert all(line["reason"] for line in lines)
    counts, _ = Counts.open(whole / "concepts" / "counts.safetensors")
    assert counts.total("samples") == usable
    assert counts.total("unreadable") == len(BAD)
    assert int(counts.any_text.sum()) == usable  # one of five words in every caption
    assert len(EmbeddingStore.open(whole / "images")) == usable


def test_rows_are_what_each_sample_gives_by_itself(spec, whole):
    shards, alone, first = ShardSet.open(spec), pair(rows=1), 0
    for name, size in zip(shards.names, shards.sizes, strict=True):
        rows, _ = open_rows(whole / "rows" / f"{name}.safetensors")
        assert rows.ids.tolist() == shards.ids[first : first + size].tolist()
        for row in np.flatnonzero(rows.usable).tolist():
            sample = shards.read(first + row)
            picture = alone.picture(sample)
            image = alone.image_vectors([picture.pixels])
            text = alone.text_vectors([alone.caption(sample)])
            assert rows.score[row] == pytest.approx(float((image * text).sum()), abs=2e-3)
            assert (rows.width[row], rows.height[row]) == (48, 56)
            assert rows.content[row] == short_hash(sample.fields["png"])
            assert rows.words[row] == 3
        assert np.isnan(rows.score[~rows.usable]).all()
        first += size


def on_ranks(comm: Comm, spec: str, out: Path) -> None:
    scan(spec, out, questions(), comm)
    find_repeats(ShardSet.open(spec), out, comm, most_bits=4, rows_at_once=4)


def killed(comm: Comm, spec: str, out: Path) -> None:
    """Ends without a word in the middle of a shard's files, as a kill does."""
    import os

    written = scanning.save_rows

    def save(path: Path, rows: object, header: object) -> None:
        if path.stem == "001":
            os.kill(os.getpid(), signal.SIGKILL)
        written(path, rows, header)  # type: ignore[arg-type]

    scanning.save_rows = save
    scan(spec, out, questions(), comm)


def test_two_and_four_ranks_and_a_kill_leave_the_bytes_of_one_that_was_not_killed(
    spec, whole, tmp_path
):
    find_repeats(ShardSet.open(spec), whole, Comm.solo(), most_bits=4)
    out = tmp_path / "out"
    with pytest.raises((RuntimeError, AssertionError, EOFError)):
        run_ranks(killed, 1, spec, out)
    assert (out / "images" / "001.vectors").exists()
    assert not (out / "rows" / "001.safetensors").exists()
    before = (out / "rows" / "000.safetensors").stat().st_mtime_ns
    run_ranks(on_ranks, 2, spec, out)
    assert (out / "rows" / "000.safetensors").stat().st_mtime_ns == before
    assert files_of(out) == files_of(whole)
    run_ranks(on_ranks, 4, spec, tmp_path / "four")  # one of them has no shard
    assert files_of(tmp_path / "four") == files_of(whole)


def test_a_near_copy_in_another_shard_is_found_and_the_first_one_stays(spec, whole):
    shards = ShardSet.open(spec)
    find_repeats(shards, whole, Comm.solo(), most_bits=4)
    flags = np.concatenate([read_repeats(whole, name) for name in shards.names])
    twins = shards.ids[[0, 20]]
    assert flags.nonzero()[0].tolist() == [[0, 20][int(np.argmax(twins))]]


def test_another_question_or_a_changed_shard_is_refused(spec, whole, tmp_path):
    with pytest.raises(DataError, match="another model, bank or settings"):
        scan(spec, whole, questions(texts=False), Comm.solo())
    other = write_corpus(tmp_path / "data")
    samples = {"000": {"png": picture(99), "txt": b"word1 and word2"}}
    write_index(write_tar(tmp_path / "data" / "000.tar", samples))
    with pytest.raises(DataError, match="changed"):
        scan(other, whole, questions(), Comm.solo())
