"""Every recipe has its page: paper, equation, code file, run file, cost, what was tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from trainer.config import load_run
from trainer.settings.recipe_files import recipe_config, recipe_names

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "recipes"
LIST = (PAGES / "README.md").read_text()
FILES = r"`((?:trainer|tests|launch)/[\w/.]+?\.(?:py|yaml)|tests/golden/\w+/|(?:test_\w+\.py))`"


def test_the_recipes_are_found():
    assert {"clip", "siglip", "protoclip", "mlcd", "tinyclip", "palm"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_a_page_that_says_what_is_asked_of_one(name):
    page = (PAGES / f"{name}.md").read_text()
    for part in ("## What it computes", "## What it costs", "## What was tried", "| needs |"):
        assert part in page, part
    paper = re.search(r"\d{4}\.\d{5}", (ROOT / f"trainer/recipes/{name}.py").read_text())
    assert paper is not None
    assert f"arXiv {paper[0]}" in page.split("## What it computes")[0].replace("\n", " ")
    computes = page.split("## What it computes")[1].split("\n## ")[0]
    assert re.search(r"=|:  ", computes), "an equation"
    assert f"`trainer/recipes/{name}.py`" in page
    row = re.search(rf"^\| \[{name}\]\({name}\.md\) \| (\S+) \| .*$", LIST, re.M)
    assert row is not None
    assert row[1] == paper[0]


@pytest.mark.parametrize("name", recipe_names())
def test_what_a_recipes_page_names_is_there_and_its_run_file_trains_it(name):
    page = (PAGES / f"{name}.md").read_text()
    for found in re.findall(FILES, page):
        path = f"tests/recipes/{found}" if found.startswith("test_") else found
        assert (ROOT / path).exists(), f"{name}.md names {found}"
    runs = re.findall(r"`(launch/runs/\w+\.yaml)`", page.split("## What it computes")[0])
    trained = {load_run(ROOT / run).recipe.name for run in runs}
    assert trained == {name}


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_of_a_run_file_is_read(page):
    name = page.stem
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        shown = yaml.safe_load(block)["recipe"]
        recipe_config({"name": name, **REST.get(name, {}), **shown})


REST = {
    "protoclip": {"episode_samples": 200_000, "clusters": 20_000},
    "tinyclip": {"distill": {"model": "models/pair"}},
}
"""What a page that shows a part of its recipe's section leaves out."""


def test_run_files_that_the_list_names_exist():
    named = set(re.findall(r"`(\w+\.yaml)`", LIST))
    assert len(named) > 15
    assert [run for run in named if not (ROOT / "launch/runs" / run).exists()] == []
