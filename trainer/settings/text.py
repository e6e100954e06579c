"""YAML text and dotted overrides to the mapping that a configuration is validated from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from trainer.errors import ConfigError

# Whatever PyYAML raises on input that it can't make sense of, besides errors of its own.
_SENSELESS = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
)


class _Loader(yaml.SafeLoader):
    """YAML where `1e4` is a number, as people expect, and a key stands once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice in one section", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: list(rules) for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of YAML text; ValueError, of one line, where it is none."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _SENSELESS as error:
        raise ValueError(_one_line(error)) from error


def read_mapping(text: str, overrides: Sequence[str], *, source: str) -> dict[str, Any]:
    """The mapping of YAML text with `a.b.0.c=value` overrides (values are YAML too)."""
    try:
        values: Any = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a mapping of keys to values")
    for override in overrides:
        key, value = parsed_override(override)
        try:
            values = _changed(values, key, value)
        except ValueError as error:
            raise ConfigError(f"override {override!r}: {error}") from error
    return dict(values)


def parsed_override(override: str) -> tuple[tuple[str, ...], Any]:
    """(parts of the key, value) of `a.b=value`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} has no '='; write key=value, as in steps=100")
    parts = tuple(key.strip().split("."))
    if not all(parts):
        raise ConfigError(f"override {override!r} has no key before '='; write it as in steps=100")
    try:
        return parts, read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from error


def _changed(values: Any, key: Sequence[str], value: Any, before: str = "") -> Any:
    """A copy of `values` with the entry at `key` replaced; what it shares is left as it is."""
    if not key:
        return value
    first, *rest = key
    path = f"{before}{first}"
    if isinstance(values, list):
        if not re.fullmatch(r"-?\d+", first) or not -len(values) <= int(first) < len(values):
            many = f"{len(values)} {'entry' if len(values) == 1 else 'entries'}"
            name = before.rstrip(".")
            raise ValueError(f"{name} is a list of {many}, counted from 0; {first!r} is none")
        position = int(first) % len(values)
        inner = _changed(values[position], rest, value, f"{path}.")
        return [*values[:position], inner, *values[position + 1 :]]
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{before.rstrip('.')} is not a section")
    return {**values, first: _changed(values.get(first), rest, value, f"{path}.")}


def _one_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split()) or type(error).__name__
