"""The large corpus over small archives: what joins the small one, and what must not."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.data.corpus_archives import corpus_files, svg, write_archives
from tests.data.test_corpus_build import bytes_of, records_of
from trainer.data.corpus import iconify
from trainer.data.corpus.build import build_corpus
from trainer.data.corpus.iconify import read_archive, what_and_how
from trainer.data.corpus.large import build_large
from trainer.data.corpus.more_splits import squeezed
from trainer.data.corpus.npm import SETS, WORDS_PIN, IconifySet, pack_command
from trainer.data.corpus.pairs import fraction
from trainer.data.corpus.pictures import pixel_hash, render_svg
from trainer.data.corpus.splits import NEAR_SUBGROUPS, UNSEEN_ICON_NAMES, is_unseen
from trainer.data.corpus.wheels import PINS, Pin
from trainer.data.shards import ShardSet
from trainer.errors import DataError

LICENCE = {"license": {"spdx": "MIT"}}
NUM_NAMES = 40
EMPTY = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'


class Built(NamedTuple):
    folder: Path
    cache: Path
    sets: list[IconifySet]
    words: Pin
    manifest: dict[str, Any]


def packed(path: Path, files: dict[str, Any]) -> str:
    """A package as npm packs it; its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def body(number: int, tilt: int) -> str:
    drawing = svg(number, tilt).decode()
    return drawing[drawing.index(">") + 1 : drawing.rindex("<")]


def icon_set(cache: Path, vendor: str, kind: str, icons: dict[str, Any], **more: Any) -> IconifySet:
    """A set of `icons`, bodies by name, 12 wide and 20 high, in the form of Iconify."""
    drawn = {
        name: value if isinstance(value, dict) else {"body": value} for name, value in icons.items()
    }
    table = {"icons": drawn, "width": 12, "height": 20, "aliases": more.pop("aliases", {})}
    pin = Pin("1.0.0", f"iconify-json-{vendor}-1.0.0.tgz", "")
    sha = packed(cache / pin.file, {"icons.json": table, "info.json": LICENCE, **more})
    return IconifySet(vendor, "MIT", kind, pin._replace(sha256=sha))


def small_sets(cache: Path, names: dict[str, str]) -> list[IconifySet]:
    icons = {f"name-{n}-filled": body(n + 2000, 8) for n in range(NUM_NAMES)}
    icons |= {
        "copy-of-a-test": svg_of_a_test(),
        "empty": "",
        "twice": body(3001, 8),
        "twice-outline": body(3001, 8),
        "not-drawn": "<path d=",
        "shower": body(3002, 8),
        **{name: body(3100 + n, 8) for n, name in enumerate(names.values())},
    }
    new_names = {f"new-{n}": body(n + 1000, 8) for n in range(NUM_NAMES)}
    emoji = {name: body(n + 3200, 8) for n, name in enumerate([*names.values(), "no-such-name"])}
    aliases = {
        "other-word": {"parent": "name-1-filled"},
        "turned": {"parent": "shower", "rotate": 1},
    }
    categories = {"metadata.json": {"categories": {"Numbers": ["name-1-filled"]}}}
    return [
        icon_set(cache, "akar-icons", "icon", icons, aliases=aliases, **categories),
        icon_set(
            cache,
            "iconoir",
            "icon",
            {
                **{f"name-{n}": body(n + 4000, 8) for n in range(NUM_NAMES)},
                "unheard": body(4095, 8),
            },
        ),
        icon_set(cache, "icon-park", "color", new_names),
        icon_set(cache, "emojione", "emoji", emoji),
        icon_set(cache, "flagpack", "flag", {"zz": body(3300, 8), "toolong": body(3301, 8)}),
    ]


def svg_of_a_test() -> dict[str, Any]:
    """What `ood-far-icon-heroicons` shows."""
    return {"body": body(5 * NUM_NAMES, 4), "width": 12, "height": 16}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("large")
    cache = root / "npm"
    cache.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for package, pin in write_archives(root / "cache", corpus_files(60)).items():
            patch.setitem(PINS, package, pin)
        build_corpus(root / "open", cache=root / "cache", per_shard=50)
        names = {
            r["concept_id"]: r["concept"]
            for r in records_of(root / "open")
            if r["domain"] == "emoji"
        }
        sets = small_sets(cache, names)
        rows = [{"name": "name-2", "aliases": ["second-name"], "tags": ["Count"]}]
        words = WORDS_PIN._replace(sha256=packed(cache / WORDS_PIN.file, {"meta.json": rows}))
        made = {"cache": root / "cache", "npm_cache": cache, "per_shard": 50}
        manifest = build_large(root / "large", sets=sets, words_pin=words, **made)
        yield Built(root / "large", root, sets, words, manifest)


def test_the_splits_of_the_small_corpus_stay(built: Built) -> None:
    small = json.loads((built.cache / "open" / "manifest.json").read_text("utf-8"))
    for split, facts in small["splits"].items():
        assert built.manifest["splits"][split]["pairs"] == facts["pairs"]
        then, now = (
            [(r["vendor"], r["concept_id"], r["pix"]) for r in records_of(folder, split)]
            for folder in (built.cache / "open", built.folder)
        )
        assert then == now


def test_no_tested_picture_trains_and_nothing_empty_does(built: Built) -> None:
    looks: dict[bool, set[str]] = {True: set(), False: set()}
    for split, facts in built.manifest["splits"].items():
        records = records_of(built.folder, split)
        looks[split.startswith("train")] |= {r["pix"] for r in records}
        assert len(ShardSet.open(str(built.folder / facts["spec"]))) == len(records)
    assert not looks[True] & looks[False]
    assert pixel_hash(render_svg(EMPTY)) not in looks[True]
    names = {r["name"] for r in records_of(built.folder) if r["vendor"] == "akar-icons"}
    assert not names & {"copy of a test", "empty", "not drawn"}
    dropped = built.manifest["dropped"]
    assert dropped["train-more-icon: same pixels as a picture of a test"] == 1
    assert dropped["train-more-icon: nothing to be seen"] == 1
    assert dropped["train-more-icon: the same picture under the same name"] == 1
    assert dropped["akar-icons: can't be drawn"] == 1


def test_unseen_names_and_the_vendor_that_tests_do_not_train(built: Built) -> None:
    for split in built.manifest["splits"]:
        for record in records_of(built.folder, split):
            if record["domain"] in ("icon", "color") and "more" in split:
                unseen = fraction("unseen icon name", record["concept_id"]) < UNSEEN_ICON_NAMES
                assert unseen == split.startswith("val")
            if record["vendor"] == "iconoir":
                assert split == "test-unseen-icon-vendor"
    trained = {
        r["concept_id"]
        for s in built.manifest["splits"]
        if s.startswith("train")
        for r in records_of(built.folder, s)
    }
    tested = {r["concept_id"] for r in records_of(built.folder, "test-unseen-icon-vendor")}
    assert tested
    assert tested <= trained


def test_nothing_new_trains_that_is_named_as_a_held_out_emoji(built: Built) -> None:
    held_out = {
        squeezed(r["name"])
        for r in records_of(built.folder)
        if r["domain"] == "emoji"
        and (r["subgroup"] in NEAR_SUBGROUPS or is_unseen(r["concept_id"]))
    }
    more = [
        r
        for s in built.manifest["splits"]
        if s.startswith("train-more")
        for r in records_of(built.folder, s)
    ]
    assert held_out
    assert not held_out & {squeezed(r["name"]) for r in more}
    emoji = [r for r in more if r["vendor"] == "emojione"]
    assert emoji
    assert {r["concept_id"] for r in emoji} <= {
        r["concept_id"] for r in records_of(built.folder, "train")
    }
    assert built.manifest["dropped"]["emojione: no name"] == 1
    assert built.manifest["dropped"]["flagpack: no name"] == 2


def test_other_names_keywords_definitions_and_categories_reach_the_samples(built: Built) -> None:
    by_name = {r["name"]: r for r in records_of(built.folder) if r["vendor"] == "akar-icons"}
    assert by_name["name 1"]["alias"] == ["other word"]
    assert by_name["name 1"]["category"] == "Numbers"
    assert by_name["name 1"]["style"] == "filled"
    assert by_name["name 2"]["alias"] == ["second name"]
    assert by_name["name 2"]["keywords"] == ["Count"]
    assert "second name" in by_name["name 2"]["long"]
    assert {r["licence"] for r in by_name.values()} == {"MIT"}


def test_a_killed_build_goes_on_with_what_is_drawn(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn a second time, and the bytes are the same."""

    def never(data: bytes) -> bytes:
        raise AssertionError("drawn again")

    monkeypatch.setattr(iconify, "render_svg", never)
    made = {"cache": built.cache / "cache", "npm_cache": built.cache / "npm", "per_shard": 50}
    build_large(tmp_path / "again", sets=built.sets, words_pin=built.words, **made)
    assert bytes_of(tmp_path / "again") == bytes_of(built.folder)
    lines: list[str] = []
    build_large(
        tmp_path / "again", sets=built.sets, words_pin=built.words, report=lines.append, **made
    )
    assert lines[0].startswith("already built")


def test_another_licence_than_the_pinned_one_is_refused(built: Built) -> None:
    with pytest.raises(DataError, match=r"licence is MIT, and CC0-1.0 is pinned"):
        read_archive(
            built.cache / "npm" / built.sets[0].pin.file, built.sets[0]._replace(licence="CC0-1.0")
        )


@pytest.mark.parametrize(
    ("vendor", "key", "expected"),
    [
        ("fluent", "arrow-left-24-filled", ("arrow left", "24-filled")),
        ("fluent", "traffic-light", ("traffic light", "plain")),
        ("iconamoon", "bulb-light", ("bulb", "light")),
        ("bx", "bxs-server", ("server", "plain")),
        ("material-symbols", "cake-outline-rounded", ("cake", "outline-rounded")),
        ("streamline-emojis", "man-farmer-1", ("man farmer", "plain")),
        ("ri", "24-hours-line", ("24 hours", "line")),
        ("tdesign", "excited-1", ("excited 1", "plain")),
    ],
)
def test_a_file_name_is_what_and_how(vendor: str, key: str, expected: tuple[str, str]) -> None:
    assert what_and_how(key, vendor) == expected


def test_every_set_is_pinned_by_hash_and_no_closed_or_reserved_set_is_among_them() -> None:
    assert all(len(each.pin.sha256) == 64 for each in SETS)
    assert len({each.vendor for each in SETS}) == len(SETS)
    assert not {v for each in SETS if "fluent-emoji" in (v := each.vendor) or "heroicons" in v}
    assert {each.kind for each in SETS} == {"icon", "color", "emoji", "flag"}
    assert "--ignore-scripts" in pack_command("a", SETS[0].pin, Path())
