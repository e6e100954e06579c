"""What the pages and helps name is there."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.test_rules import ROOMS

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests" / "golden" / "README.md"]
)
HISTORY = ("NOTES.md", "CHANGELOG.md")
"""They tell what was, under the names of its day."""
TOOLS = sorted(ROOT.glob("tools/*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files, and headings inside of them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(found), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """As the hosts of repositories make them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_and_run_files_that_a_page_names_exist(page):
    if page.name in HISTORY:
        return
    named = r"\b(?:tools/\w+\.py|launch/[\w/]+\.(?:sh|yaml)|ds_configs/\w+\.json)"
    for path in set(re.findall(named, page.read_text())) - {"launch/runs/slip.yaml"}:
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_first_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_can_be_found_from_the_first_one(page):
    if page.parent == ROOT / "docs":
        assert f"](docs/{page.name}" in (ROOT / "README.md").read_text()
    elif page.parent == ROOT / "docs" / "recipes" and page.name != "README.md":
        assert f"]({page.name})" in (page.parent / "README.md").read_text()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_the_help_of_a_tool_shows_an_example(tool):
    said = ast.get_docstring(ast.parse(tool.read_text())) or ""
    assert f"python tools/{tool.name}" in said
    assert "description=__doc__" in tool.read_text() or "__doc__" in tool.read_text()


def test_the_help_of_a_run_names_files_that_exist():
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    named = set(re.findall(r"\b[\w/]+\.yaml", done.stdout)) - {"RUN.yaml"}
    assert named
    assert all((ROOT / path).exists() for path in named)


def test_the_floors_of_the_architecture_are_those_of_the_code():
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"^((?:\w+ {1,2})*\w+) {2,}\S.* .*$", page.split("```")[1], re.M)
    floors = [[ROOMS.index(room) for room in line.split()] for line in reversed(drawn)]
    assert len(floors) > 8
    for lower, upper in itertools.pairwise(floors):
        assert max(lower) < min(upper), [ROOMS[place] for place in (*lower, *upper)]


def test_every_folder_of_golden_arrays_says_where_it_is_from():
    said = (ROOT / "tests" / "golden" / "README.md").read_text()
    folders = [path for path in (ROOT / "tests" / "golden").iterdir() if path.is_dir()]
    assert len(folders) > 5
    assert [path.name for path in folders if f"`{path.name}/" not in said] == []


def test_the_package_lists_what_the_requirements_pin():
    """Who installs it gets what the tried environment has; optional ones stand apart."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    listed = {re.split(r"[<>=\[]", name)[0].lower() for name in project["dependencies"] + extras}
    pinned = (ROOT / "requirements.txt").read_text().split("# Tests")[0]
    names = {
        re.split(r"[=;\s]", line)[0].lower() for line in pinned.splitlines() if line[:1].isalpha()
    }
    assert names - {"triton", "ninja", "faiss-gpu"} <= listed
