"""The files of trainer/recipes/: a file's name is the recipe's key in YAML."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.settings.errors import did_you_mean


def recipe_names() -> Sequence[str]:
    folder = Path(__file__).parents[1] / "recipes"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def recipe_module(name: str) -> Any:
    """The module trainer/recipes/<name>.py; ConfigError where there is none."""
    if name not in recipe_names():
        raise ConfigError(
            f"no recipe file trainer/recipes/{name}.py; there are: {', '.join(recipe_names())}"
        )
    return importlib.import_module(f"trainer.recipes.{name}")


def recipe_config(values: Mapping[str, Any]) -> Any:
    """The `recipe:` section of a run, validated by the `Config` of the file that `name` names.

    pydantic's ValidationError where a key is wrong, ValueError where the recipe is not known.
    """
    return config_class(values).model_validate(dict(values))


def config_class(values: Mapping[str, Any]) -> Any:
    """The `Config` of the recipe that a section names; ValueError where it names none."""
    name = values.get("name")
    if not isinstance(name, str):
        raise ValueError(f"name is missing; it is one of {', '.join(recipe_names())}")
    if name not in recipe_names():
        raise ValueError(f"no recipe is called {name!r}{did_you_mean(name, recipe_names())}")
    return recipe_module(name).Config
