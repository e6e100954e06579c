"""What every section of the configuration is made of: strict keys, and the types of their values.

A key that is given is read, or refused. One that only some choices read says so in its annotation,
`Annotated[float, OnlyWhere("loss", "mlcd")]`, and is refused under the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class OnlyWhere:
    """Marks a key that is read only where another key of its section has one of these values."""

    def __init__(self, key: str, *values: Any) -> None:
        self.key, self.values = key, values

    def is_read(self, section: Any) -> bool:
        return getattr(section, self.key) in self.values

    @property
    def way_out(self) -> str:
        return f"set {self.key} to {' or '.join(map(shown, self.values))}"


class OnlyWith(OnlyWhere):
    """Marks a key that is read only where another one is given, and not zero or empty."""

    def is_read(self, section: Any) -> bool:
        return bool(getattr(section, self.key))

    @property
    def way_out(self) -> str:
        return f"set {self.key}"


class Frozen(BaseModel):
    """A section of the configuration: immutable; keys that are unknown or not read are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _refuse_keys_that_nothing_reads(self) -> Frozen:
        for key in unread_keys(self, self.model_fields_set):
            mark = _marks(self, key)[0]
            other = shown(getattr(self, mark.key))
            raise ValueError(
                f"{key} is not read where {mark.key} is {other}; drop {key}, or {mark.way_out}"
            )
        return self


def unread_keys(section: BaseModel, given: Collection[str]) -> list[str]:
    """The keys among `given` that other keys of the section make meaningless.

    A value that is the default changes nothing, and stands in every configuration that was written
    out in full.
    """
    fields = type(section).model_fields
    return [
        key
        for key in fields
        if key in given
        and getattr(section, key) != fields[key].get_default(call_default_factory=True)
        and any(not mark.is_read(section) for mark in _marks(section, key))
    ]


def _marks(section: BaseModel, key: str) -> Sequence[OnlyWhere]:
    """A key's marks, those first that are not satisfied."""
    found = type(section).model_fields[key].metadata
    marks = [mark for mark in found if isinstance(mark, OnlyWhere)]
    return sorted(marks, key=lambda mark: mark.is_read(section))


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def at_home(path: str) -> str:
    """A path with `~` and `~user` spelt out, as a shell does; ValueError for an unknown user."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{path!r}: no home folder is known for {path.split('/')[0]!r}") from None


def _path_at_home(path: Path) -> Path:
    return Path(at_home(str(path)))


_SET = re.compile(r"([A-Za-z0-9][\w.-]{0,63})=(?!=)")


def split_set(part: str) -> tuple[str, str]:
    """(name of the set, path) of one part of a shard list, `cc3m=/data/{000..331}.tar`; a set
    without a name is ''."""
    match = _SET.match(part)
    return (match[1], part[match.end() :]) if match else ("", part)


def _one_list(value: Any) -> Any:
    """Shards as one text: a list's parts, and a mapping's with the name of their set."""
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(part, str) for part in value):
            raise ValueError("a list of shards holds texts, and one at least")
        return "::".join(value)
    if isinstance(value, dict):
        if not value:
            raise ValueError("a mapping of sets holds one at least, as cc3m: 'cc3m/{000..331}.tar'")
        return "::".join(_named(name, parts) for name, parts in value.items())
    return value


def _named(name: Any, parts: Any) -> str:
    if not _SET.fullmatch(f"{name}="):
        raise ValueError(
            f"{name!r} can't name a set; use letters, digits, '.', '_' and '-', 64 at most"
        )
    parts = _one_list(parts)
    if not isinstance(parts, str):
        raise ValueError(f"the set {name} is {parts!r}; give its shards as a text or a list")
    parts = [part.strip() for part in parts.split("::")]
    if inner := next((split_set(part)[0] for part in parts if split_set(part)[0]), None):
        raise ValueError(f"the set {name} holds a part that is named {inner}; a set has one name")
    return "::".join(f"{name}={part}" for part in parts)


def _shards_at_home(spec: str) -> str:
    return "::".join(_part_at_home(part) for part in spec.split("::"))


def _part_at_home(part: str) -> str:
    name, path = split_set(part.strip())
    return f"{name}={at_home(path)}" if name else at_home(path)


def _without_dot(name: str) -> str:
    if not name.strip(". ") or "/" in name:
        raise ValueError(f"{name!r} is no name of a member; write jpg, or input.jpg")
    return name.removeprefix(".").lower()


MemberName = Annotated[str, AfterValidator(_without_dot)]
"""What stands behind the first dot of a file's name in a shard, in small letters."""
LocalPath = Annotated[Path, AfterValidator(_path_at_home)]
"""A file or folder; `~` is the home folder."""
ModelPath = Annotated[str, AfterValidator(at_home)]
"""A folder, where `~` is the home folder, or a hub id."""
ShardSpec = Annotated[str, BeforeValidator(_one_list), AfterValidator(_shards_at_home)]
"""Shards: a path or URL with braces or globs; lists join by `::`. `~` is the home folder. In YAML
also a list of such texts, or a mapping from names of sets to them; `name=path` in a text."""
