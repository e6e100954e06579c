"""What pydantic found wrong with a section of YAML, in the words of the user who wrote it.

One sentence for each mistake: the key's whole path, what was found, and what was probably meant.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

Section = type[BaseModel]
Place = tuple[str | int, ...]
CLOSE = 0.65
"""As difflib counts: what is less alike is no typing mistake."""
MOST_SHOWN = 6
"""Mistakes; the others are counted."""


def explain(
    error: ValidationError, root: Section, *, sections: Mapping[str, Section] | None = None
) -> str:
    """Every mistake of `error` by its path below `root`, joined by semicolons.

    `sections` names the classes of top-level keys whose own annotation does not tell them.
    """
    found: dict[str, list[str]] = {}
    tree = _Tree(root, sections or {})
    for problem in error.errors(include_url=False):
        place, section = tree.at(problem["loc"])
        said = found.setdefault(".".join(map(str, place)), [])
        said.append(_sentence(problem, place, section, tree))
    whole = [(path, " or ".join(dict.fromkeys(told))) for path, told in found.items()]
    lines = [f"{path}: {told}" if path else told for path, told in whole[:MOST_SHOWN]]
    if len(whole) > MOST_SHOWN:
        lines.append(f"and {len(whole) - MOST_SHOWN} more")
    return _known_once("; ".join(lines))


def did_you_mean(word: Any, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` where a known word is close, else what is known."""
    close = difflib.get_close_matches(str(word).lower(), known, n=1, cutoff=CLOSE)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


class _Tree:
    """The sections below a root, found through the annotations of their fields."""

    def __init__(self, root: Section, sections: Mapping[str, Section]) -> None:
        self.root, self.sections = root, sections

    def at(self, loc: Place) -> tuple[Place, Section | None]:
        """The path of keys without pydantic's names for members of a union; the section there."""
        models, kept, last = [self.root], list[str | int](), len(loc) - 1
        section: Section | None = self.root
        for position, part in enumerate(loc):
            if isinstance(part, int):
                kept.append(part)
                continue
            owner = next((model for model in models if part in model.model_fields), None)
            if owner is not None:
                section, models = owner, self.below(owner, part)
                kept.append(part)
            elif position == last and models:
                section = models[0]
                kept.append(part)
        return tuple(kept), section

    def below(self, owner: Section, key: str) -> list[Section]:
        if owner is self.root and key in self.sections:
            return [self.sections[key]]
        return list(_sections_in(owner.model_fields[key].annotation))

    def paths(self, section: Section | None = None, before: Place = ()) -> Iterator[Place]:
        """Every key of the tree; items of lists have no number."""
        section = section or self.root
        for key in section.model_fields:
            yield (*before, key)
            if len(before) < 6:
                for below in self.below(section, key):
                    yield from self.paths(below, (*before, key))


def _sections_in(annotation: Any) -> Iterator[Section]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _sentence(problem: Any, place: Place, section: Section | None, tree: _Tree) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"there is no such key{_nearest_key(str(place[-1]), section, tree)}"
        case "missing":
            return f"is missing{_what_it_is(str(place[-1]), section)}"
        case "literal_error" | "enum":
            known = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            return f"{_shown(problem['input'])} is not known{did_you_mean(problem['input'], known)}"
        case "value_error" | "assertion_error":
            return str(problem["msg"]).partition(", ")[2]
    message = re.sub(r"^(Input|Value) ", "", str(problem["msg"]))
    return f"{message}, found {_shown(problem['input'])}"


def _nearest_key(key: str, section: Section | None, tree: _Tree) -> str:
    own = list(section.model_fields) if section else []
    if not difflib.get_close_matches(key.lower(), own, n=1, cutoff=CLOSE):
        elsewhere = {path for path in tree.paths() if path[-1] == key}
        if elsewhere:
            least = min(map(len, elsewhere))  # the same key of deeper sections is rarely meant
            named = sorted(".".join(map(str, path)) for path in elsewhere if len(path) == least)
            return f"; did you mean {' or '.join(named[:3])}?"
    return did_you_mean(key, own)


def _known_once(text: str) -> str:
    """Without the repetitions of a list of known keys."""
    for known in dict.fromkeys(re.findall(r"; known: [^;]*", text)):
        head, _, tail = text.partition(known)
        text = head + known + tail.replace(known, "")
    return text


def _what_it_is(key: str, section: Section | None) -> str:
    field = section.model_fields.get(key) if section else None
    said = field.description if field else None
    first = " ".join(said.split()).partition(". ")[0].rstrip(".") if said else ""
    return f" ({first})" if first else ""


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
