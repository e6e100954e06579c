"""What the fast lane leaves out, and which tests a change asks for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers

from tests import ranks
from tests.lanes import EXAMPLES, changed_tests, dependants, draw_few, starts_processes
from tests.ranks import run_ranks


def by_name() -> None:
    run_ranks(print, 2)


def by_module() -> None:
    ranks.run_ranks(print, 2)


def through_another() -> object:
    return [by_name() for _ in range(2)]


def within_a_function() -> object:
    def inner() -> object:
        return subprocess.run(["true"])

    return inner


TABLE = np.arange(3)


def harmless() -> str:
    return str(Path("run") / str(TABLE))


@pytest.mark.parametrize("function", [by_name, by_module, through_another, within_a_function])
def test_what_starts_processes_is_seen_in_its_code(function) -> None:
    assert starts_processes(function)
    assert not starts_processes(harmless)


@pytest.mark.parametrize("examples", [4, 60])
def test_a_property_is_tried_on_few_examples_and_never_on_more_than_it_says(examples: int) -> None:
    seen = []

    @settings(max_examples=examples, database=None)
    @given(integers())
    def holds(value: int) -> None:
        seen.append(value)

    draw_few(holds)
    holds()
    assert len(seen) == min(examples, EXAMPLES)
    draw_few(len)  # whatever has no settings is left as it is


FILES = {
    "trainer/__init__.py": "",
    "trainer/__main__.py": "from trainer.loop import train",
    "trainer/loop.py": "def train(name): import_module(f'trainer.recipes.{name}')",
    "trainer/recipes/__init__.py": "",
    "trainer/recipes/clip.py": "from trainer import losses",
    "trainer/losses.py": "",
    "trainer/masks.py": "",
    "tools/draw.py": "import trainer.masks",
    "tests/__init__.py": "",
    "tests/test_losses.py": "import trainer.losses",
    "tests/test_train.py": "['-m', 'trainer']",
    "tests/test_draw.py": "['tools/draw.py']",
    "tests/test_masks.py": "from trainer.masks import a",
    "tests/drawn.py": "import trainer.masks",
    "tests/test_drawn.py": "['-m', 'tests.drawn']",
    "tests/house/test_rules.py": "",
    "docs/page.md": "words",
    "run.yaml": "a: 1",
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("trainer/losses.py", {"losses", "train"}),
        ("trainer/masks.py", {"masks", "draw", "drawn"}),
        ("trainer/recipes/clip.py", {"train"}),
        ("trainer/__init__.py", {"losses", "train", "masks", "draw", "drawn"}),
        ("tests/test_masks.py", {"masks"}),
        ("docs/page.md", set()),
        ("run.yaml", {"losses", "train", "masks", "draw", "drawn"}),
    ],
)
def test_a_change_asks_for_the_tests_that_import_it(tmp_path, changed, expected) -> None:
    """Directly, through others, by a name that is put together, or as a program."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
    for command in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert changed_tests(tmp_path) == {tmp_path / "tests/house/test_rules.py"}
    changed_tests.cache_clear()
    (tmp_path / changed).write_text(FILES[changed] + "\n# changed\n")
    found = changed_tests(tmp_path) - {tmp_path / "tests/house/test_rules.py"}
    assert {path.stem.removeprefix("test_") for path in found} == expected


@pytest.mark.heavy
def test_the_project_s_own_imports_are_followed() -> None:
    root = Path(__file__).parents[1]
    found = dependants(root, [root / "trainer/losses/sigmoid.py"])
    for expected in ("trainer/recipes/siglip.py", "trainer/loop.py", "tests/test_loop.py"):
        assert root / expected in found
    assert root / "tests/data/test_order.py" not in found
