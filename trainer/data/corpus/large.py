"""The large corpus: the small one, its tests untouched, and the icon sets of the npm index.

Fluent's emoji, Heroicons, and what Noto, Twemoji or OpenMoji drew before are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.corpus.build import (
    Known,
    Report,
    find_corpus,
    make_header,
    packages_of,
    read_pairs,
    refuse_foreign_files,
    write_whole,
)
from trainer.data.corpus.emoji import describe_emoji, emoji_pair
from trainer.data.corpus.emoji_names import EmojiNames, Entry, tones_of
from trainer.data.corpus.iconify import Icon, draw, icons_of, read_archive
from trainer.data.corpus.icons import icon_name
from trainer.data.corpus.more_splits import assign_more, held_out_names, squeezed
from trainer.data.corpus.npm import DEFAULT_CACHE as NPM_CACHE
from trainer.data.corpus.npm import (
    SETS,
    WORDS_PACKAGE,
    WORDS_PIN,
    IconifySet,
    fetch_archive,
    fetch_sets,
)
from trainer.data.corpus.pairs import Pair
from trainer.data.corpus.pictures import pixel_hash
from trainer.data.corpus.splits import assign_splits
from trainer.data.corpus.wheels import DEFAULT_CACHE, Pin
from trainer.data.corpus.write import PAIRS_PER_SHARD

_ICON = Entry("", "objects", "icon")
"""Where a definition of an icon's name is looked up: among artifacts, food, substances."""


class Words(NamedTuple):
    """Other names and keywords of icons, by name."""

    alias: Mapping[str, Sequence[str]]
    keywords: Mapping[str, Sequence[str]]


def build_large(
    out: Path,
    *,
    cache: Path = DEFAULT_CACHE,
    npm_cache: Path = NPM_CACHE,
    sets: Sequence[IconifySet] = SETS,
    words_pin: Pin = WORDS_PIN,
    per_shard: int = PAIRS_PER_SHARD,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Builds the large corpus in `out` unless it's there already; returns its manifest.

    Goes on where it was stopped: downloads and each set's drawings are kept. The folder appears
    whole or not at all.
    """
    packages = packages_of(glosses=True)
    header = _header(make_header(packages, glosses=True, per_shard=per_shard), sets, words_pin)
    if manifest := find_corpus(out, header["fingerprint"]):
        report(f"already built: {manifest['pairs']} pairs in {out}")
        return manifest
    refuse_foreign_files(out)
    report(f"fetching {len(sets) + 1} icon sets into {npm_cache}")
    paths = fetch_sets(sets, npm_cache)
    words = read_words(fetch_archive(WORDS_PACKAGE, words_pin, npm_cache))
    dropped: Counter[str] = Counter()
    small, known = read_pairs(packages, cache, dropped, report)
    splits = assign_splits(small, dropped)
    new = [
        pair
        for each in sets
        for pair in _reported(read_set(each, paths[each.vendor], words, known, dropped), report)
    ]
    splits |= assign_more(new, splits, held_out_names(known.names), dropped)
    header["dropped"] = dropped
    return write_whole(out, splits, header, per_shard, report)


def _header(small: Mapping[str, Any], sets: Sequence[IconifySet], words: Pin) -> dict[str, Any]:
    sources = {each.package: each.pin._asdict() for each in sets}
    sources[WORDS_PACKAGE] = words._asdict()
    what = {**small, "preset": "large", "icon_sets": sources}
    fingerprint = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
    return {**what, "fingerprint": fingerprint}


def _reported(pairs: list[Pair], report: Report) -> list[Pair]:
    if pairs:
        report(f"{pairs[0].vendor}: {len(pairs)} drawings")
    return pairs


# -- pairs ---------------------------------------------------------------------------------------


def read_words(archive: Path) -> Words:
    """Other names and keywords that one vendor gives its icons; they serve all vendors' icons."""
    with tarfile.open(archive, "r:gz") as tar:
        file = tar.extractfile("package/meta.json")
        rows = [] if file is None else json.loads(file.read())
    alias = {icon_name(row["name"]): [icon_name(a) for a in row["aliases"]] for row in rows}
    return Words(alias, {icon_name(row["name"]): row["tags"] for row in rows})


def read_set(
    each: IconifySet, path: Path, words: Words, known: Known, dropped: Counter[str]
) -> list[Pair]:
    """Every drawing of a set that can be drawn, and named where names are Unicode's."""
    file = read_archive(path, each)
    icons = icons_of(file, each.vendor)
    drawn = draw(path, each, file, [icon.key for icon in icons])
    dropped[f"{each.vendor}: can't be drawn"] += len(icons) - len(drawn)
    there = [icon for icon in icons if icon.key in drawn]
    if each.kind in ("emoji", "flag"):
        return _emoji_pairs(each, there, drawn, known, dropped)
    return [_icon_pair(each, icon, drawn[icon.key], words, known) for icon in there]


def _emoji_pairs(
    each: IconifySet,
    icons: Iterable[Icon],
    drawn: Mapping[str, bytes],
    known: Known,
    dropped: Counter[str],
) -> list[Pair]:
    """One drawing of each emoji: further ones of a set differ by gender or tone alone."""
    keys = _keys_by_name(known.names)
    pairs: dict[str, Pair] = {}
    for icon in icons:
        key = _flag_key(icon.key) if each.kind == "flag" else keys.get(squeezed(icon.name))
        if key not in known.names.entries:
            dropped[f"{each.vendor}: no name"] += 1
        elif key not in pairs:
            gloss = describe_emoji(known.names.concept_of(key), known.names, known.glosses)
            pairs[key] = emoji_pair(each.vendor, key, drawn[icon.key], known.names, gloss)
    return list(pairs.values())


def _flag_key(name: str) -> str | None:
    """`de` and `de-4x3` -> the two code points of that flag."""
    match = re.fullmatch("([a-z])([a-z])(-4x3)?", name)
    return (
        "-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in match.groups()[:2]) if match else None
    )


def _keys_by_name(names: EmojiNames) -> dict[str, str]:
    """Key of each emoji without skin tone by all its names; a name of two goes to the first."""
    found: dict[str, str] = {}
    plain = [key for key in names.entries if not tones_of(key)]
    for key in plain:
        found.setdefault(squeezed(names.entries[key].name), key)
    for key in plain:
        for alias in names.aliases.get(key, []):
            found.setdefault(squeezed(alias), key)
    return found


def _icon_pair(each: IconifySet, icon: Icon, png: bytes, words: Words, known: Known) -> Pair:
    facts = {
        "name": icon.name,
        "concept": icon.name,
        "concept_id": f"icon:{icon.name}",
        "group": None,
        "subgroup": None,
        "tone": [],
        "vendor": each.vendor,
        "domain": each.kind,
        "style": icon.style,
        "alias": sorted({*icon.alias, *words.alias.get(icon.name, [])} - {icon.name}),
        "keywords": list(words.keywords.get(icon.name, [])),
        "category": icon.category,
        "lang": {"en": icon.name},
        "licence": each.licence,
    }
    facts |= _definition(icon.name, facts, known)
    facts["long"] = _long_text(facts)
    return Pair(
        domain=each.kind,
        vendor=each.vendor,
        key=icon.key,
        concept=f"icon:{icon.name}",
        png=png,
        pixels=pixel_hash(png),
        caption=f"{icon.name} icon",
        facts=facts,
    )


def _definition(name: str, facts: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """WordNet's definition where the whole name is a word, and the other words for it."""
    gloss = None
    if known.glosses is not None:
        entry = _ICON._replace(name=name)
        gloss = known.glosses.find_whole(entry, [*facts["alias"], *facts["keywords"]])
    if gloss is None:
        return {"gloss": None, "synonyms": []}
    return {"gloss": gloss.text, "synonyms": gloss.synonyms}


def _long_text(facts: Mapping[str, Any]) -> str:
    """One paragraph of what is known. The facts are real, the sentences that join them fixed."""
    name = facts["name"]
    sentences = [f"An icon of {name}."]
    if facts["gloss"]:
        sentences.append(f"{name[0].upper()}{name[1:]} means: {facts['gloss']}.")
    if others := list(dict.fromkeys([*facts["alias"], *facts["synonyms"]]))[:6]:
        sentences.append(f"It is also called {' or '.join(others)}.")
    if facts["keywords"]:
        sentences.append(f"Words that go with it: {', '.join(facts['keywords'][:10])}.")
    if facts["category"]:
        sentences.append(f"It is found under {facts['category']}.")
    return " ".join(sentences)
