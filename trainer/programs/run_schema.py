"""docs/run.schema.json: what a run file may hold, for editors (JSON Schema, draft 2020-12)."""

from __future__ import annotations

import json
from typing import Any

from trainer.config import RunConfig
from trainer.settings.recipe_files import recipe_module, recipe_names

PERIOD = {"type": "string", "pattern": r"^\s*(never|[\d.e+]+\s*(steps?|samples?|epochs?|min))\s*$"}
_REFERENCE = "#/$defs/{model}"


def run_schema() -> str:
    """The schema as text. It says names and shapes; what must fit together `load_run` knows."""
    schema = RunConfig.model_json_schema(ref_template=_REFERENCE)
    definitions: dict[str, Any] = schema.pop("$defs")
    for name in ("RecipeConfig", "ModelSection"):  # each recipe has its own
        definitions.pop(name, None)
    definitions["Period"] = PERIOD
    for name in recipe_names():
        recipe = recipe_module(name).Config.model_json_schema(ref_template=_REFERENCE)
        for below, meaning in recipe.pop("$defs", {}).items():
            _add(definitions, below, PERIOD if below == "Period" else meaning)
        recipe["required"] = sorted({*recipe.get("required", ()), "name"})
        _add(definitions, f"recipe_{name}", recipe)
    schema["properties"]["recipe"] = {
        "anyOf": [{"$ref": f"#/$defs/recipe_{name}"} for name in recipe_names()],
        "description": schema["properties"]["recipe"].get("description", ""),
    }
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "A run of ProtoScale",
        "$defs": dict(sorted(definitions.items())),
    }
    return json.dumps(_without_structured_periods(whole), indent=1, ensure_ascii=False) + "\n"


def _add(definitions: dict[str, Any], name: str, meaning: Any) -> None:
    if "preset" in meaning.get("properties", {}):
        meaning.pop("required", None)  # what isn't given comes from the preset
    known = definitions.setdefault(name, meaning)
    if known != meaning:
        raise ValueError(f"two sections of the configuration are called {name}; rename one")


def _without_structured_periods(value: Any) -> Any:
    """Defaults that are periods as the words that a file has for them."""
    if isinstance(value, list):
        return [_without_structured_periods(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"count", "unit"}:
        return "never" if value["unit"] == "never" else f"{value['count']:g} {value['unit']}"
    return {key: _without_structured_periods(each) for key, each in value.items()}
