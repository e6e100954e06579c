"""Counting whole shards: by hand, killed, on several ranks, with tags, in several languages."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.curation.corpus import write_corpus
from tests.fixtures.emoji import read_pairs, write_shards
from tests.ranks import run_ranks
from tools import concepts as tool
from trainer.comm import Comm
from trainer.concepts import Bank, Concept, Counts, Lemmas, words_of
from trainer.concepts.balance import (
    draw_probability,
    keep_probability,
    tail_share,
    thresholds_of_languages,
)
from trainer.concepts.count import Captions, count_shards
from trainer.concepts.tags import Tags, calibrated_threshold
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.programs.concepts import class_bank, read_table

SOLO = Comm.solo()
ENGLISH = Captions({"en": "txt"}, {})
BANK = Bank.of_names(["face", "red apples", "cat", "Hand", "unicorn made of glass"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def counted(comm: Comm, spec: str, out: Path) -> list[int]:
    return count_shards(spec, BANK, ENGLISH, out, comm).any_text.tolist()


def test_shards_of_two_sets_may_have_one_name(tmp_path):
    specs = [write_shards(tmp_path / name, count=24, per_shard=24) for name in ("one", "two")]
    one = counted(SOLO, specs[0], tmp_path / "counts")
    both = "::".join(f"{name}={spec}" for name, spec in zip("ab", specs, strict=True))
    assert counted(SOLO, both, tmp_path / "both") == [2 * count for count in one]
    assert sum(one) > 0
    kept = {path.stem for path in (tmp_path / "both/shards").iterdir()}
    (name,) = {path.stem for path in (tmp_path / "counts/shards").iterdir()}
    assert kept == {f"a={name}", f"b={name}"}


def test_counts_are_those_of_a_plain_search_and_ranks_and_kills_change_no_byte(tmp_path):
    spec = write_shards(tmp_path / "data", count=120, per_shard=25)
    shards, lemmas = ShardSet.open(spec), Lemmas()
    found = counted(SOLO, spec, tmp_path / "alone")
    texts = [shards.read(index).fields["txt"].decode() for index in range(len(shards))]
    lines = [f" {' '.join(words_of(text, lemmas))} " for text in texts]
    names = [f" {' '.join(words_of(name, lemmas))} " for name in BANK.names]
    assert found == [sum(name in line for line in lines) for name in names]
    assert sum(found) > 0
    assert found[-1] == 0
    alone = files(tmp_path / "alone")
    assert run_ranks(counted, 2, spec, tmp_path / "two") == [found, found]
    assert files(tmp_path / "two") == alone
    # Killed after some shards: they are not counted again, and the end is the same.
    killed = tmp_path / "killed"
    for name in [name for name in alone if name.startswith("shards/")][1:3]:
        (killed / name).parent.mkdir(parents=True, exist_ok=True)
        (killed / name).write_bytes(alone[name])
    said: list[str] = []
    count_shards(spec, BANK, ENGLISH, killed, SOLO, say=said.append)
    assert len(said) == len(shards.shards) - 2
    assert files(killed) == alone


def test_another_question_in_the_same_folder_is_refused(tmp_path):
    spec = write_shards(tmp_path / "data", count=20, per_shard=20)
    counted(SOLO, spec, tmp_path / "out")
    with pytest.raises(DataError, match="counted with another bank"):
        count_shards(spec, Bank.of_names(["dog"]), ENGLISH, tmp_path / "out", SOLO)
    none = Captions({"en": "txt"}, {"en": "none"})
    with pytest.raises(DataError, match="counted with another bank"):
        count_shards(spec, BANK, none, tmp_path / "out", SOLO)
    with pytest.raises(ConfigError, match="no concept in 'de', only in en"):
        count_shards(spec, BANK, Captions({"de": "lang.de"}, {}), tmp_path / "de", SOLO)


def test_a_field_that_nobody_has_is_not_a_corpus_without_concepts(tmp_path):
    spec = write_shards(tmp_path / "data", count=20, per_shard=10)
    with pytest.raises(DataError, match="none of 20 samples has a text under 'caption'"):
        count_shards(spec, BANK, Captions({"en": "caption"}, {}), tmp_path / "en", SOLO)


def test_a_damaged_sample_is_in_no_bank_and_a_key_that_nobody_has_is_named(tmp_path):
    spec = write_corpus(tmp_path / "data")
    with pytest.raises(DataError, match="has a class under 'nothing'"):
        class_bank(spec, "nothing")
    assert len(class_bank(spec, "txt")) > 3


def test_a_table_of_a_spreadsheet_is_read_and_a_row_that_stands_twice_is_refused(tmp_path):
    path, head = tmp_path / "table.csv", "dataset,concept,frequency,right,samples\r\n"
    path.write_bytes(f"\ufeff{head}a,cat,3,1,2\r\nb,cat,3,2,2\r\n".encode())
    assert read_table(path).dataset == ["a", "b"]
    path.write_text(f"{head}a,cat,3,1,2\na,cat,3,2,2\n")
    with pytest.raises(DataError, match="'cat' of 'a' twice"):
        read_table(path)


def test_tags_join_by_shard_and_key(tmp_path):
    spec = write_shards(tmp_path / "data", count=20, per_shard=10)
    shards = ShardSet.open(spec)
    tagged = [shards.name_of(index) for index in range(15)]
    lines = [
        json.dumps({"shard": Path(shard).name, "key": key, "tags": {"cat": 0.9, "face": 0.3}})
        for shard, key, _ in reversed(tagged)
    ]
    path = tmp_path / "tags.jsonl"
    path.write_text("\n".join(lines) + "\n")
    images = {}
    for threshold in (0.2, 0.5, 0.95):
        tags = Tags(path, BANK, threshold)
        counts = count_shards(spec, BANK, ENGLISH, tmp_path / str(threshold), SOLO, tags=tags)
        assert counts.total("tagged") == 15
        images[threshold] = counts.frequency("image").tolist()
        assert (counts.frequency("joint") <= counts.frequency("text")).all()
    assert images == {0.2: [15, 0, 15, 0, 0], 0.5: [0, 0, 15, 0, 0], 0.95: [0] * 5}
    by_concept = Tags(path, BANK, {"cat": 0.95})
    assert by_concept.of(tagged[0][2]) == (0,)
    path.write_text('{"shard": "another", "key": "b", "tags": {"cat": 1}}\n')
    with pytest.raises(DataError, match="none of 20 samples has a line"):
        count_shards(spec, BANK, ENGLISH, tmp_path / "none", SOLO, tags=Tags(path, BANK))
    path.write_text(lines[0] + "\n" + lines[0] + "\n")
    with pytest.raises(DataError, match="line 2 is a second line of one image"):
        Tags(path, BANK)
    path.write_text('{"shard": "a", "key": "b", "tags": {"cat": NaN}}\n')
    with pytest.raises(DataError, match="no finite number"):
        Tags(path, BANK)
    line = {"set": "s", "shard": Path(tagged[0][0]).name, "key": tagged[0][1], "tags": {"cat": 1}}
    path.write_text(json.dumps(line))
    named = count_shards(f"s={spec}", BANK, ENGLISH, tmp_path / "set", SOLO, tags=Tags(path, BANK))
    assert named.total("tagged") == 1
    path.write_text('{"shard": "a", "key": "b", "tags": {"dog": 1}}\n')
    with pytest.raises(DataError, match="line 1 has the tag 'dog', which the bank lacks"):
        Tags(path, BANK)
    path.write_text("[]\n")
    with pytest.raises(DataError, match="is no line of tags"):
        Tags(path, BANK)


def test_a_threshold_is_the_lowest_that_is_precise_enough():
    scores = np.array([0.9, 0.8, 0.7, 0.7, 0.6, 0.1])
    shows = np.array([True, True, False, True, False, False])
    assert calibrated_threshold(scores, shows, precision=1.0) == 0.8
    assert calibrated_threshold(scores, shows, precision=0.75) == 0.7
    assert calibrated_threshold(scores, shows, precision=0.5) == 0.1
    assert calibrated_threshold(scores[2:3], shows[2:3], precision=0.5) == float("inf")


def test_languages_have_tails_of_one_share():
    draw = np.random.default_rng(0)
    large = (10 ** draw.uniform(0, 5, 300)).astype(np.int64)
    small = large // 50
    found = thresholds_of_languages({"en": large, "de": small}, first="en", threshold=20_000.0)
    assert found["en"] == 20_000
    share = tail_share(large, 20_000.0)
    assert tail_share(small, found["de"]) <= share < tail_share(small, found["de"] * 1.5)
    assert found["de"] == pytest.approx(20_000 / 50, rel=0.2)
    with pytest.raises(DataError, match="nothing to balance"):
        tail_share(np.zeros(3, np.int64), 5.0)

    with pytest.raises(DataError, match="above zero"):
        thresholds_of_languages({"en": large}, first="en", threshold=-1.0)


def test_a_caption_is_kept_as_often_as_any_of_its_concepts_draws_it():
    counts = np.array([10, 100, 1000, 0])
    draws = draw_probability(counts, 50.0)
    assert draws.tolist() == [1.0, 0.5, 0.05, 1.0]
    assert keep_probability((1, 2), draws) == pytest.approx(1 - 0.5 * 0.95)
    assert keep_probability((0, 2), draws) == 1.0
    assert keep_probability((), draws) == 0.0
    simulated = np.random.default_rng(1).random((20_000, 2)) < draws[[1, 2]]
    assert simulated.any(axis=1).mean() == pytest.approx(keep_probability((1, 2), draws), abs=0.02)


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["concepts.py", *map(str, arguments)])
    monkeypatch.setattr(tool.Comm, "from_environment", tool.Comm.solo)
    tool.main()


@pytest.mark.heavy
def test_bank_count_balance_and_report_as_commands(tmp_path, monkeypatch, capsys):
    spec = write_shards(tmp_path / "data", count=40, per_shard=20)
    bank, counts = tmp_path / "bank.jsonl", tmp_path / "counts"
    call(monkeypatch, "bank", "--data", spec, "--target", "subgroup", "--out", bank)
    names = {pair["subgroup"] for pair in read_pairs(40)}
    assert set(Bank.open(bank).names) == names
    call(monkeypatch, "count", "--data", spec, "--bank", bank, "--out", counts)
    assert Counts.open(counts / "counts.safetensors")[0].total("samples") == 40
    capsys.readouterr()
    Bank([Concept("face", {"en": ("face",)})]).save(tmp_path / "face.jsonl")
    more = tmp_path / "more"
    call(monkeypatch, "count", "--data", spec, "--bank", tmp_path / "face.jsonl", "--out", more)
    capsys.readouterr()
    call(monkeypatch, "balance", "--counts", more, "--threshold", 5)
    assert json.loads(capsys.readouterr().out)["en"]["threshold"] == 5
    table = tmp_path / "table.csv"
    rows = [f"set,c{n},{10**n},{n + 2},10" for n in range(6)]
    table.write_text("\n".join(["dataset,concept,frequency,right,samples", *rows]) + "\n")
    call(monkeypatch, "report", "--table", table, "--out", tmp_path / "r", "--resamples", 20)
    assert "r 1.000, Spearman 1.000, 10.00 points a decade" in capsys.readouterr().out
    figures = json.loads((tmp_path / "r" / "report.json").read_text())
    assert Counter(row["rows"] for row in figures["by_frequency"]) == {1: 6}
    assert (tmp_path / "r" / "trend.png").stat().st_size > 10_000
    assert "data:image/png;base64" in (tmp_path / "r" / "report.html").read_text()
    wrong = ("--bank", bank, "--out", counts, "--captions", "txt")
    with pytest.raises(ConfigError, match="is not LANGUAGE=VALUE"):
        call(monkeypatch, "count", "--data", spec, *wrong)
    table.write_text("dataset,concept,frequency,right,samples\na,b,1,3,2\n")
    with pytest.raises(DataError, match="3 of 2 samples right"):
        call(monkeypatch, "report", "--table", table, "--out", tmp_path / "r")
