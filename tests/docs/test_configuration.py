"""The page and the schema of a run file say what the classes say that read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from trainer.config import RunConfig, load_run
from trainer.programs.configuration_page import configuration_page, sections_below, sentence_of
from trainer.programs.run_schema import run_schema
from trainer.settings.recipe_files import recipe_module, recipe_names

ROOT = Path(__file__).parents[2]
RUNS = sorted(
    path
    for path in (ROOT / "launch" / "runs").glob("*.yaml")
    if {"recipe", "workdir"} <= yaml.safe_load(path.read_text()).keys()
)
OUT_OF_DATE = "is not what the classes say; run: python tools/pages.py"


def test_the_page_is_what_the_classes_say():
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == configuration_page(), f"docs/configuration.md {OUT_OF_DATE}"
    assert max(len(line) for line in written.splitlines()) <= 110


def test_the_schema_is_what_the_classes_say():
    written = (ROOT / "docs" / "run.schema.json").read_text()
    assert written == run_schema(), f"docs/run.schema.json {OUT_OF_DATE}"


def test_every_key_of_every_section_has_a_sentence():
    todo = [RunConfig, *(recipe_module(name).Config for name in recipe_names())]
    told: list[type] = []
    while todo:
        section = todo.pop()
        told.append(section)
        for key, field in section.model_fields.items():
            sentence = sentence_of(section, key)
            assert sentence.endswith((".", "!", ")")), f"{section.__module__}.{key}: {sentence!r}"
            todo += [s for s in sections_below(field.annotation) if s not in [*told, *todo]]


def test_runs_are_valid_by_the_schema_and_mistakes_are_not():
    """By the reference implementation, which editors use too."""
    validator = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads(run_schema())
    check = validator.Draft202012Validator(schema)
    assert len(RUNS) > 8
    for path in RUNS:
        values = yaml.safe_load(path.read_text())
        assert not [error.message for error in check.iter_errors(values)], path
        load_run(path)
        for wrong in (
            values | {"step": 3},
            values | {"steps": "many"},
            values | {"save_every": "10 hours"},
            values | {"recipe": values["recipe"] | {"name": "clap"}},
            {key: value for key, value in values.items() if key != "data"},
        ):
            assert list(check.iter_errors(wrong)), (path, wrong)
