"""A text as words, the same way for captions and for the names of concepts.

NFKC, case folded, without accents, digits kept, one table of lemmas. What is done to one side only
loses counts: cased and irregular nouns are found nowhere when the index keeps them and the query
does not.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from trainer.concepts.plurals import singular
from trainer.errors import ConfigError, DataError

_ACCENTS = re.compile("[\u0300-\u036f]")
"""Of Latin, Greek and Cyrillic letters. Vowel signs and voicing marks of others are letters."""
_POSSESSIVE = re.compile(r"['\u2019]s\b")
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Thai, Lao, Burmese, Khmer, kana and Han: written without spaces, so each letter is a word."""
_SIMPLEMMA = "simplemma:"


def _marks() -> str:
    """Combining marks, as a regular expression's set: Python counts them to no word."""
    return "".join(chr(c) for c in range(0x10000) if unicodedata.category(chr(c))[0] == "M")


_WORD = re.compile(f"[{_SPACELESS}]|(?:(?![{_SPACELESS}])(?:[^\\W_]|[{_marks()}]))+")


class Lemmas:
    """One form for all forms of a word. Applied to captions and concepts alike.

    `none`; `english`, plurals by rule and table; a file of lines `form<TAB>lemma`; or, for some
    fifty languages, `simplemma:de` (pip install simplemma).
    """

    def __init__(self, source: str = "english") -> None:
        self.source = source
        self._lemma, self.digest = _source(source)

    def __call__(self, word: str) -> str:
        return self._lemma(word)


def words_of(text: str, lemmas: Lemmas) -> tuple[str, ...]:
    """The words of a text in their order, each as its lemma."""
    plain = text if text.isascii() else _without_accents(unicodedata.normalize("NFKC", text))
    folded = plain.lower() if plain.isascii() else plain.casefold()
    return tuple(lemmas(word) for word in _WORD.findall(_POSSESSIVE.sub("", folded)))


def _without_accents(text: str) -> str:
    apart = _ACCENTS.sub("", unicodedata.normalize("NFD", text))
    return unicodedata.normalize("NFC", apart)


def _source(source: str) -> tuple[Callable[[str], str], str]:
    """The function, and a digest of what it does."""
    if source == "none":
        return str, "none"
    if source == "english":
        return lru_cache(maxsize=1 << 18)(singular), f"english {_digest_of_rules()}"
    if source.startswith(_SIMPLEMMA):
        return _simplemma(source.removeprefix(_SIMPLEMMA))
    return _of_file(Path(source))


def _digest_of_rules() -> str:
    rules = importlib.import_module("trainer.concepts.plurals").__file__
    assert rules is not None
    return hashlib.sha256(Path(rules).read_bytes()).hexdigest()[:16]


def _of_file(path: Path) -> tuple[Callable[[str], str], str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"lemmas {str(path)!r} can't be read ({error.strerror}); give none, english, "
            "simplemma:LANGUAGE or a file of lines form<TAB>lemma"
        ) from None
    table = _table(text, path)
    return (lambda word: table.get(word, word)), hashlib.sha256(text.encode()).hexdigest()


def _table(text: str, path: Path) -> Mapping[str, str]:
    """Forms and lemmas, both brought to what a word looks like before its lemma is sought."""
    plain = Lemmas("none")
    table: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        sides = [words_of(side, plain) for side in line.split("\t")]
        if len(sides) != 2 or any(len(side) != 1 for side in sides):
            raise DataError(f"{path} line {number} is not form<TAB>lemma, a word each: {line!r}")
        table[sides[0][0]] = sides[1][0]
    # A lemma is its own lemma, or the order of the lines would decide what matches what.
    if chained := [form for form, lemma in table.items() if table.get(lemma, lemma) != lemma]:
        raise DataError(
            f"{path} gives {chained[0]!r} the lemma {table[chained[0]]!r}, which has another one "
            "itself; write the last one"
        )
    return table


def _simplemma(language: str) -> tuple[Callable[[str], str], str]:
    try:
        package = importlib.import_module("simplemma")
    except ImportError:
        raise ConfigError(
            f"lemmas {_SIMPLEMMA}{language} need a package: pip install simplemma"
        ) from None
    plain = Lemmas("none")

    @lru_cache(maxsize=1 << 18)
    def lemma(word: str) -> str:
        found = words_of(package.lemmatize(word, lang=language), plain)
        return found[0] if len(found) == 1 else word

    try:
        lemma("a")
    except ValueError as error:
        raise ConfigError(f"lemmas {_SIMPLEMMA}{language}: {error}") from None
    return lemma, f"simplemma {package.__version__} {language}"
