"""The concepts that are looked for, and how each language writes them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.data.captions import field_texts
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import ConfigError, DataError

ENGLISH = "en"


class Concept(NamedTuple):
    """A thing with a name. Any of its forms in a caption is a hit, counted once a caption."""

    name: str
    forms: Mapping[str, tuple[str, ...]]
    """Texts by language."""


class Bank:
    """Concepts in a fixed order: the order of every table of counts."""

    def __init__(self, concepts: Iterable[Concept]) -> None:
        self.concepts = tuple(concepts)
        self.names = tuple(concept.name for concept in self.concepts)
        if len(set(self.names)) < len(self.names):
            double = Counter(self.names).most_common(1)[0][0]
            raise DataError(f"the bank has {double!r} twice; give each concept one line")
        if not self.concepts:
            raise DataError("the bank has no concept; give at least one")

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that any concept has a form in, sorted."""
        return tuple(sorted({language for concept in self.concepts for language in concept.forms}))

    @property
    def digest(self) -> str:
        """SHA-256 of names and forms in their order."""
        return hashlib.sha256(self._lines().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """One JSON object a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._lines(), encoding="utf-8")

    @classmethod
    def open(cls, path: Path | str) -> Bank:
        """A file of lines: plain names, or objects `{"name": "...", "forms": {"en": ["..."]}}`.

        DataError where a line is neither.
        """
        try:
            # Editors of Windows begin a file with a mark and end lines in two bytes.
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise DataError(f"can't read the bank {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"the bank {path} is not text in UTF-8 (byte {error.start}); save it as UTF-8"
            ) from None
        return cls(
            _read(line, f"{path} line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )

    @classmethod
    def of_names(cls, names: Sequence[str]) -> Bank:
        """English names that are their own only form."""
        return cls(Concept(name, {ENGLISH: (name,)}) for name in names)

    @classmethod
    def of_shards(cls, spec: str, key: str, forms: Mapping[str, Sequence[str]]) -> Bank:
        """The distinct values of a json key, sorted; `forms` names, by language, the fields whose
        texts are forms of the sample's concept, as `{"en": ["alias"], "de": ["lang.de"]}`."""
        shards = ShardSet.open(spec)
        found: dict[str, dict[str, dict[str, None]]] = {}
        for index in range(len(shards)):
            try:
                _collect(shards.read(index).fields, key, forms, found)
            except (BadSample, DamagedSample):
                continue  # counting puts it into the ledger
        if not found:
            raise DataError(f"no sample of {spec} has a text under {key!r}; name another key")
        return cls(
            Concept(name, {language: tuple(texts) for language, texts in found[name].items()})
            for name in sorted(found)
        )

    def _lines(self) -> str:
        return "".join(
            json.dumps({"name": name, "forms": forms}, ensure_ascii=False) + "\n"
            for name, forms in self.concepts
        )


def _collect(
    fields: dict[str, bytes],
    key: str,
    forms: Mapping[str, Sequence[str]],
    found: dict[str, dict[str, dict[str, None]]],
) -> None:
    for name in field_texts(fields, key)[:1]:
        by_language = found.setdefault(name, {ENGLISH: {name: None}})
        for language, sources in forms.items():
            texts = by_language.setdefault(language, {})
            texts |= dict.fromkeys(text for field in sources for text in field_texts(fields, field))


def _read(line: str, place: str) -> Concept:
    if not line.lstrip().startswith("{"):
        return Concept(line.strip(), {ENGLISH: (line.strip(),)})
    try:
        values = json.loads(line)
        name, forms = values["name"], values.get("forms", {ENGLISH: [values["name"]]})
        if not isinstance(name, str) or not name.strip():
            raise TypeError("`name` is no text")
        if not all(isinstance(texts, list) for texts in forms.values()):
            raise TypeError("forms of a language are a list of texts")
        if not all(isinstance(text, str) for texts in forms.values() for text in texts):
            raise TypeError("a form is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{place} is no concept ({error}); write {{"name": "..."}}') from None
    return Concept(name, {language: tuple(texts) for language, texts in forms.items()})


def refuse_unknown(languages: Sequence[str], bank: Bank) -> None:
    """ConfigError where the bank has no concept in a language that captions are in."""
    if unknown := [language for language in languages if language not in bank.languages]:
        raise ConfigError(
            f"the bank has no concept in {unknown[0]!r}, only in {', '.join(bank.languages)}; "
            "leave those captions out, or add forms"
        )
