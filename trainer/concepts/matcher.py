"""Which concepts of a bank a caption names: as a phrase, or as a bag of words.

A phrase is found where its words follow each other. A bag is found where all of its words stand
anywhere; a word that no caption has makes it found nowhere, and is never dropped from the question.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from trainer.concepts.bank import Bank
from trainer.concepts.words import Lemmas, words_of
from trainer.errors import ConfigError, DataError

Engine = Literal["trie", "ahocorasick"]
Words = tuple[str, ...]


class Hits(NamedTuple):
    """Numbers of concepts, each once, ascending."""

    phrase: tuple[int, ...]
    bag: tuple[int, ...]
    """Contains every phrase."""


class Search(Protocol):
    """Which forms stand in a row of words, by the numbers they were given."""

    def __call__(self, words: Words) -> Iterator[int]: ...


class Matcher:
    """Finds a bank's forms of one language in captions.

    `trie` walks words through dictionaries. `ahocorasick` is the package pyahocorasick, whose cost
    does not depend on the size of the bank. Both find the same.
    """

    def __init__(
        self, bank: Bank, *, language: str, lemmas: Lemmas, engine: Engine = "trie"
    ) -> None:
        self.lemmas = lemmas
        forms = _forms(bank, language, lemmas)
        self._forms = list(forms)
        self._owners = [tuple(sorted(forms[form])) for form in self._forms]
        self._phrases: Search = (
            _Automaton(self._forms) if engine == "ahocorasick" else _Trie(self._forms)
        )
        self._bags = _Bags(self._forms)

    def __call__(self, caption: str) -> Hits:
        words = words_of(caption, self.lemmas)
        return Hits(self._concepts(self._phrases(words)), self._concepts(self._bags(words)))

    def _concepts(self, forms: Iterator[int]) -> tuple[int, ...]:
        return tuple(sorted({owner for form in forms for owner in self._owners[form]}))


def _forms(bank: Bank, language: str, lemmas: Lemmas) -> dict[Words, set[int]]:
    """The concepts of every different form."""
    forms: dict[Words, set[int]] = {}
    for number, concept in enumerate(bank.concepts):
        for text in concept.forms.get(language, ()):
            words = words_of(text, lemmas)
            if not words:
                raise DataError(
                    f"{text!r}, a form of the concept {concept.name!r}, has no word that could be "
                    "found; take it out of the bank"
                )
            forms.setdefault(words, set()).add(number)
    return forms


class _Trie:
    """Nested dictionaries, a word a level; where a form ends stands its number."""

    _END = ""

    def __init__(self, forms: Sequence[Words]) -> None:
        self._root: dict[str, Any] = {}
        for number, form in enumerate(forms):
            node = self._root
            for word in form:
                node = node.setdefault(word, {})
            node[self._END] = number

    def __call__(self, words: Words) -> Iterator[int]:
        for start, first in enumerate(words):
            node = self._root.get(first)
            place = start + 1
            while node is not None:
                if self._END in node:
                    yield node[self._END]
                node = node.get(words[place]) if place < len(words) else None
                place += 1


class _Automaton:
    """pyahocorasick over words joined by spaces; a space at both ends keeps words whole."""

    def __init__(self, forms: Sequence[Words]) -> None:
        try:
            package = importlib.import_module("ahocorasick")
        except ImportError:
            raise ConfigError(
                "the engine ahocorasick needs a package: pip install pyahocorasick; or take "
                "engine trie, which finds the same"
            ) from None
        self._automaton = package.Automaton()
        for number, form in enumerate(forms):
            self._automaton.add_word(f" {' '.join(form)} ", number)
        if forms:
            self._automaton.make_automaton()

    def __call__(self, words: Words) -> Iterator[int]:
        if len(self._automaton):
            for _, number in self._automaton.iter(f" {' '.join(words)} "):
                yield number


class _Bags:
    """A form is looked up by the one of its words that the fewest forms have."""

    def __init__(self, forms: Sequence[Words]) -> None:
        self._bags = [frozenset(form) for form in forms]
        frequency = Counter(word for bag in self._bags for word in bag)
        self._by_word: dict[str, list[int]] = {}
        for number, bag in enumerate(self._bags):
            rarest = min(sorted(bag), key=frequency.__getitem__)
            self._by_word.setdefault(rarest, []).append(number)

    def __call__(self, words: Words) -> Iterator[int]:
        present = frozenset(words)
        for word in present:
            for number in self._by_word.get(word, ()):
                if self._bags[number] <= present:
                    yield number
