"""Dictionary definitions for emoji names, and captions long enough for a language model.

The definitions are WordNet 3.0's (Princeton; noun files). A name has many senses: allowed are the
lexicographer files that fit the emoji's subgroup, and among those the sense that shares most
words with the emoji's keywords (simplified Lesk), then WordNet's own order. Smileys and symbols
get none: their names are phrases, any sense would be wrong.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.data.corpus.emoji_names import Entry

_UNFIT = re.compile(
    r"offensive|disparag|derogat|slur|obscen|vulgar|homosexual|prostitut|racial|ethnic", re.I
)
"""Senses never attached to a picture."""

# Lexicographer files of nouns (lexnames in WordNet): 3 tops, 4 act, 5 animal, 6 artifact, 8 body,
# 10 communication, 11 event, 13 food, 15 location, 17 object, 18 person, 19 phenomenon, 20 plant,
# 21 possession, 27 substance, 28 time.
_FILES_OF_GROUP = {
    "animals-and-nature": {3, 5, 17, 19, 20},
    "food-and-drink": {6, 13, 20},
    "travel-and-places": {6, 15, 17, 19, 28},
    "activities": {4, 6, 10, 11},
    "objects": {6, 10, 13, 17, 21, 27},
    "flags": {15},
}
_PEOPLE = {"person", "person-role", "person-fantasy"}
_ACTIVITIES = {"person-activity", "person-sport"}
_LINKING_WORDS = {"with", "in", "of", "on", "and", "at", "to", "over", "for", "behind", "facing"}
_TOO_GENERAL = {
    *("person", "people", "man", "woman", "men", "women", "face"),
    *("button", "symbol", "sign", "mark", "front", "back", "arrow"),
    *("left", "right", "up", "down"),
}
_ALIASES_HELP = {"animals-and-nature", "food-and-drink", "travel-and-places", "activities"}

Match = Literal["full", "head", "alias"]


class Sense(NamedTuple):
    """One WordNet synset: its words, definition, first example and the synsets above it."""

    words: tuple[str, ...]
    file: int
    text: str
    example: str | None
    above: str | None


class Gloss(NamedTuple):
    """A definition chosen for an emoji; `match` says what of the name was looked up."""

    lemma: str
    match: Match
    text: str
    synonyms: list[str]
    kinds: list[str]
    """What it is a kind of, nearest first."""
    example: str | None


def allowed_files(entry: Entry) -> set[int] | None:
    """Lexicographer files that fit the emoji's subgroup; None where no definition can be right."""
    if entry.group != "people-and-body":
        return _FILES_OF_GROUP.get(entry.group)
    if entry.subgroup == "body-parts" or entry.subgroup.startswith("hand"):
        return {8}
    if entry.subgroup in _PEOPLE:
        return {3, 18}
    return {4, 18} if entry.subgroup in _ACTIVITIES else None


class Glosses:
    """WordNet's nouns with a choice of sense."""

    def __init__(self, senses: dict[str, Sense], index: dict[str, list[str]]):
        self._senses = senses
        self._index = index

    def __len__(self) -> int:
        return len(self._senses)

    @classmethod
    def read(cls, archive: Path) -> Glosses:
        """Reads the noun files out of the pinned source archive, without unpacking it."""
        senses: dict[str, Sense] = {}
        index: dict[str, list[str]] = {}
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/wordnet/dict/")[2]
                if name in ("data.noun", "data.noun1", "data.noun2"):
                    senses.update(_parse_senses(_lines(tar, member)))
                elif name == "index.noun":
                    index.update(_parse_index(_lines(tar, member)))
        return cls(senses, index)

    def find(self, entry: Entry, aliases: Sequence[str], keywords: Sequence[str]) -> Gloss | None:
        """The definition of an emoji, or None."""
        files = allowed_files(entry)
        if files is None:
            return None
        name = _plain_name(entry)
        context = _context(keywords, name)
        for phrase, match in _phrases(entry, name, aliases, files):
            if found := self._best(phrase, files, context):
                lemma, sense = found
                return self._gloss(lemma, match, sense)
        return None

    def find_whole(self, entry: Entry, keywords: Sequence[str]) -> Gloss | None:
        """The definition of a name that is a word as it stands, or None."""
        files, name = allowed_files(entry), _plain_name(entry)
        found = None if files is None else self._best(name, files, _context(keywords, name))
        return None if found is None else self._gloss(found[0], "full", found[1])

    def _gloss(self, lemma: str, match: Match, sense: Sense) -> Gloss:
        spelling = next((word for word in sense.words if word.lower() == lemma), lemma)
        synonyms = [word for word in sense.words if word != spelling][:4]
        return Gloss(spelling, match, sense.text, synonyms, self._kinds(sense, 3), sense.example)

    def _best(self, phrase: str, files: set[int], context: set[str]) -> tuple[str, Sense] | None:
        for lemma in _singulars(phrase.lower()):
            senses = [self._senses[at] for at in self._index.get(lemma, []) if at in self._senses]
            fit = [s for s in senses if s.file in files and _is_fit(s, lemma, phrase)]
            if fit:
                return lemma, max(fit, key=lambda sense: self._overlap(sense, context))
        return None

    def _overlap(self, sense: Sense, context: set[str]) -> int:
        text = " ".join([sense.text, *sense.words, *self._kinds(sense, 4)])
        return len(context.intersection(re.findall("[a-z]+", text.lower())))

    def _kinds(self, sense: Sense, count: int) -> list[str]:
        kinds: list[str] = []
        above = sense.above
        while above in self._senses and len(kinds) < count:
            kinds.append(self._senses[above].words[0])
            above = self._senses[above].above
        return kinds


def _is_fit(sense: Sense, lemma: str, phrase: str) -> bool:
    """No slurs, and no proper noun for a common one: a ball is not Lucille Ball."""
    spellings = [word for word in sense.words if word.lower() == lemma]
    proper = all(word != lemma for word in spellings) and phrase.islower()
    return not proper and not _UNFIT.search(sense.text)


def _lines(tar: tarfile.TarFile, member: tarfile.TarInfo) -> list[str]:
    file = tar.extractfile(member)
    return [] if file is None else file.read().decode("latin-1").splitlines()


def _parse_senses(lines: Sequence[str]) -> Iterator[tuple[str, Sense]]:
    """Lines of a WordNet data file (wndb(5)): offset, file, type, words, pointers | definition."""
    for line in lines:
        columns, bar, text = line.partition("|")
        if line.startswith(" ") or not bar:
            continue
        fields = columns.split()
        pointers = 4 + 2 * int(fields[3], 16)
        words = tuple(word.replace("_", " ") for word in fields[4:pointers:2])
        symbols, targets = fields[pointers + 1 :: 4], fields[pointers + 2 :: 4]
        above = [at for symbol, at in zip(symbols, targets, strict=False) if symbol in ("@", "@i")]
        yield fields[0], _sense(words, int(fields[1]), text.strip(), above)


def _sense(words: tuple[str, ...], file: int, text: str, above: list[str]) -> Sense:
    example = re.search(r'"([^"]+)"', text)
    definition = re.split(r';\s*"', text)[0].strip()
    return Sense(
        words, file, definition, example[1] if example else None, above[0] if above else None
    )


def _parse_index(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    for line in lines:
        if not line.startswith(" "):
            fields = line.split()
            yield fields[0].replace("_", " "), fields[-int(fields[2]) :]


def _singulars(word: str) -> list[str]:
    forms = [word]
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("es"):
        forms.append(word[:-2])
    return forms


def _plain_name(entry: Entry) -> str:
    """The part of a name to look up: a flag's country, otherwise what stands before the colon."""
    head, _, tail = entry.name.partition(":")
    name = tail if entry.group == "flags" and tail else head
    return name.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").strip()


def _context(keywords: Sequence[str], name: str) -> set[str]:
    words = {word for keyword in keywords for word in re.findall("[a-z]{3,}", keyword.lower())}
    return words - set(re.findall("[a-z]+", name.lower()))


def _phrases(
    entry: Entry, name: str, aliases: Sequence[str], files: set[int]
) -> Iterator[tuple[str, Match]]:
    """What to look up, best first: the name, its head cut from the left word by word, aliases."""
    whole = entry.group == "flags" or ":" not in entry.name
    yield name, "full" if whole else "head"
    if entry.group == "flags":
        return
    words = name.split()
    stops = [at for at, word in enumerate(words) if at and word in _LINKING_WORDS]
    head = words[: stops[0]] if stops else words
    for start in range(len(head)):
        phrase = " ".join(head[start:])
        role = entry.group == "people-and-body" and files == {3, 18}
        if phrase.lower() in _TOO_GENERAL and len(words) > 1:
            continue
        if not (role and phrase.endswith("ing")):
            yield phrase, "head"
    if entry.group in _ALIASES_HELP:
        for alias in aliases:
            yield alias, "alias"


def long_text(entry: Entry, gloss: Gloss | None, keywords: Sequence[str]) -> str:
    """One paragraph of what is known: name, definition, synonyms, kinds, keywords, category.

    The facts are real, the sentences that join them are this fixed pattern.
    """
    sentences = [f"A picture of {entry.name}."]
    if gloss:
        sentences.append(f"{gloss.lemma[0].upper()}{gloss.lemma[1:]} means: {gloss.text}.")
        if gloss.synonyms:
            sentences.append(f"It is also called {' or '.join(gloss.synonyms)}.")
        if gloss.kinds:
            sentences.append(f"It is a kind of {', which is a kind of '.join(gloss.kinds)}.")
        if gloss.example and entry.group != "people-and-body":  # those on people are dated
            sentences.append(f"An example: {gloss.example}.")
    if keywords:
        sentences.append(f"Words that go with it: {', '.join(keywords[:10])}.")
    subgroup, group = entry.subgroup.replace("-", " "), entry.group.replace("-", " ")
    sentences.append(f"It is found under {subgroup} in {group}.")
    return " ".join(sentences)
