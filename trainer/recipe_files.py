"""The files of trainer/recipes/: a file's name is the recipe's key in YAML."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.errors import ConfigError


def recipe_names() -> Sequence[str]:
    folder = Path(__file__).parent / "recipes"
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def recipe_module(name: str) -> Any:
    """The module trainer/recipes/<name>.py; ConfigError where there is none."""
    if name not in recipe_names():
        raise ConfigError(
            f"no recipe file trainer/recipes/{name}.py; there are: {', '.join(recipe_names())}"
        )
    return importlib.import_module(f"trainer.recipes.{name}")


def recipe_config(values: Mapping[str, Any]) -> Any:
    """The `recipe:` section of a run, validated by the `Config` of the file that `name` names."""
    name = values.get("name")
    if not isinstance(name, str):
        raise ConfigError("recipe.name is missing; it is the name of a file in trainer/recipes/")
    try:
        return recipe_module(name).Config.model_validate(dict(values))
    except ValidationError as error:
        lines = [f"recipe.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError("; ".join(lines)) from error
