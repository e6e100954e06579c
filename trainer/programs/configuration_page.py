"""docs/configuration.md: every key of a run file, as the configuration's classes say it."""

from __future__ import annotations

import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trainer.config import OnlyWhere, Period, RunConfig
from trainer.settings.recipe_files import recipe_module, recipe_names
from trainer.settings.section import shown

Section = type[BaseModel]

_HEAD = """\
# Configuration

Every key of a run file. This page is written by `python tools/pages.py` from the classes
that read the file; a test compares the two.

* A key that is not here is an error, and the nearest known one is named.
* Any key can be changed on the command line: `optim.learning_rate=1e-3`, `evals.0.limit=500`,
  `'data.augment.crop_scale=[0.4, 1.0]'`. Values are YAML.
* A period is `1000 steps`, `5e6 samples`, `2 epochs`, `30 min` or `never`.
* `docs/run.schema.json` says the same to an editor. With the YAML language server, begin a file
  with `# yaml-language-server: $schema=../../docs/run.schema.json`.
"""


def configuration_page() -> str:
    """The whole page."""
    seen: list[Section] = []
    parts = [_HEAD, *_sections(RunConfig, "A run", seen)]
    for name in recipe_names():
        config: Section = recipe_module(name).Config
        parts += _sections(config, f"recipe: {name}", seen)
    return "\n".join(parts)


def sections_below(annotation: Any) -> Iterator[Section]:
    """The sections that a value of this type may hold; a period is none, it is a word."""
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    if is_section and annotation is not Period:
        yield annotation
    for argument in typing.get_args(annotation):
        yield from sections_below(argument)


def sentence_of(section: Section, key: str) -> str:
    """What a key means: its own words, those of the class that it is inherited from, or those of
    the section that it holds; empty where nobody says anything."""
    for owner in section.__mro__:
        field = getattr(owner, "model_fields", {}).get(key)
        if field is not None and field.description:
            return " ".join(field.description.split())
    field = section.model_fields[key]
    return next((_first_line(below) for below in sections_below(field.annotation)), "")


def _sections(section: Section, title: str, seen: list[Section]) -> Iterator[str]:
    """A section and those below it that were not told yet."""
    seen.append(section)
    yield f"## {title}\n\n{_wrapped(_first_line(section), indent='')}\n"
    yield "\n".join(_key(section, key) for key in section.model_fields) + "\n"
    for field in section.model_fields.values():
        for below in sections_below(field.annotation):
            if below not in seen and not _is_placeholder(below):
                yield from _sections(below, below.__name__, seen)


def _is_placeholder(section: Section) -> bool:
    return section.__name__ in ("RecipeConfig", "ModelSection")


def _key(section: Section, key: str) -> str:
    field = section.model_fields[key]
    about = [kind_of(field.annotation, field.metadata), _default(field)]
    head = f"* `{key}` ({', '.join(part for part in about if part)}): "
    only = [mark for mark in field.metadata if isinstance(mark, OnlyWhere)]
    read = "".join(f" Read only if you {mark.way_out}." for mark in only)
    return _wrapped(head + sentence_of(section, key) + read, indent="  ")


def kind_of(annotation: Any, metadata: Any = ()) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{shown(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(kind_of(each) for each in arguments if each is not NoneType)
    if origin in (tuple, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {_plural(kind_of(arguments[0]))}"
        return f"{len(arguments)} {_plural(kind_of(arguments[0]))}"
    if origin is dict:
        return f"mapping of names to {_plural(kind_of(arguments[1]))}"
    if annotation is Period:
        return "period"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"section {annotation.__name__}"
    return _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


_KINDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
}


def _plural(kind: str) -> str:
    words = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "path": "paths"}
    return words.get(kind, kind)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or (
        isinstance(value, BaseModel) and not isinstance(value, Period)
    ):
        return ""
    if value is None:
        return "none by default"
    return f"default `{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_yaml(each) for each in value) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./ -]+", value):
        return f'"{value}"'
    return shown(value)


def _first_line(section: Section) -> str:
    text = section.__doc__ or ""
    return " ".join(text.strip().split("\n\n")[0].split())


def _wrapped(text: str, *, indent: str) -> str:
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
