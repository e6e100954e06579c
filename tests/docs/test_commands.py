"""What pages, helps and run files tell people to type is understood by the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.commands import ROOT, refused, shown_in

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FILES = [*PAGES, *sorted(ROOT.glob("launch/runs/*.yaml")), *sorted(ROOT.glob("tools/*.py"))]


def test_commands_are_found():
    by_kind = {
        kind: sum(len(shown_in(path)) for path in FILES if path.suffix == kind)
        for kind in (".md", ".yaml", ".py")
    }
    assert by_kind[".md"] > 60, by_kind
    assert by_kind[".yaml"] > 30, by_kind
    assert by_kind[".py"] > 25, by_kind


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_program_takes_every_command_that_is_shown(path: Path):
    assert [why for why in map(refused, shown_in(path)) if why] == []


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("python tools/index.py 'a.tar' --catalog x --worker", "its parser refuses it"),
        ("bash launch/local.sh launch/runs/clip.yaml dataa.train=x", "dataa"),
        ("python -m trainer RUN.yaml --plan worldsize=64", "worldsize"),
        ("bash launch/locale.sh RUN.yaml", "launch/locale.sh"),
        ("python tools/bench.py step --ranksss 2", "its parser refuses it"),
    ],
)
def test_a_mistake_in_a_command_would_be_seen(command: str, why: str):
    assert why in refused(command)
