"""Which tests the fast lane runs (`--fast`), and which a change asks for (`--changed`).

Heavy are tests that start a process, as their code says, and those that are marked so. A test of
the fast lane that starts one all the same is left out there when it does, and counts as skipped.
In every lane a test fails that leaves a process group: the next of its process could open none.
"""

from __future__ import annotations

import ast
import multiprocessing
import multiprocessing.process
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = 10
"""A property is tried on so many examples in the fast lane, instead of what it says itself."""
SECONDS, SHOWN = 0.6, 10
"""Of a core: a test that takes more is not for the fast lane, which names so many."""
TOOK = "seconds of a core"
STARTERS = (subprocess, multiprocessing)
"""Modules that start processes; a test that reaches one of them through its code is heavy."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="no test that is heavy")
    parser.addoption("--changed", action="store_true", help="what imports a changed file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        heavy = [is_heavy(item) for item in items]
        config.hook.pytest_deselected(items=list(compress(items, heavy)))
        items[:] = [item for item, is_one in zip(items, heavy, strict=True) if not is_one]
        for item in items:
            draw_few(getattr(item, "function", None))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.getoption("--changed") or not collection_path.name.startswith("test_"):
        return None
    return True if collection_path not in changed_tests(ROOT) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    lane.is_fast, begun = item.config.getoption("--fast"), time.process_time()
    yield
    lane.is_fast = False
    item.user_properties.append((TOOK, time.process_time() - begun))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says which tests of the fast lane should be marked heavy."""
    if not config.getoption("--fast"):
        return
    took = {
        report.nodeid: dict(report.user_properties).get(TOOK, 0.0)
        for report in terminalreporter.stats.get("passed", [])
    }
    for name, seconds in sorted(took.items(), key=lambda each: -each[1])[:SHOWN]:
        if seconds > SECONDS:
            terminalreporter.write_line(f"heavy? {seconds:.1f} s of a core: {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail(f"{item.nodeid} leaves its process group to the next test", pytrace=False)


def draw_few(function: Any) -> None:
    """Fewer examples of a property; what decides is hypothesis' own settings of the function."""
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if own is not None:
        # How long drawing takes on a busy machine is no fault of a test either.
        patient = {*own.suppress_health_check, hypothesis.HealthCheck.too_slow}
        few = hypothesis.settings(
            own, max_examples=min(EXAMPLES, own.max_examples), suppress_health_check=patient
        )
        function._hypothesis_internal_use_settings = few


# -- what starts processes ----------------------------------------------------------------------


class Lane:
    """Whether a test of the fast lane runs now. One that starts a process then ends there."""

    is_fast = False

    def refuse_a_process(self) -> None:
        if self.is_fast:
            self.is_fast = False
            pytest.skip("starts a process; left out of the fast lane")


lane = Lane()


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        lane.refuse_a_process()


sys.addaudithook(_listen)
_start = multiprocessing.process.BaseProcess.start


def _start_and_tell(self: Any) -> None:
    lane.refuse_a_process()
    _start(self)


multiprocessing.process.BaseProcess.start = _start_and_tell  # type: ignore[method-assign]


def is_heavy(item: pytest.Item) -> bool:
    """Marked so or as slow, or of a code that names a starter: its own, or that of its fixtures."""
    if item.get_closest_marker("heavy") or item.get_closest_marker("slow"):
        return True
    info = getattr(item, "_fixtureinfo", None)
    fixtures = [d.func for ds in info.name2fixturedefs.values() for d in ds] if info else []
    return any(map(starts_processes, [getattr(item, "function", None), *fixtures]))


@cache
def starts_processes(function: Callable[..., Any] | None) -> bool:
    function = getattr(function, "__wrapped__", function)
    return isinstance(function, types.FunctionType) and _reaches(function, set())


def _reaches(function: types.FunctionType, seen: set[types.FunctionType]) -> bool:
    """Whether a function names a starter, itself or through others of tests, tools or benches."""
    seen.add(function)
    for value in _named(function):
        # Compared by identity: a global may be an array, which is equal to nothing by itself.
        if any(value is starter for starter in STARTERS):
            return True
        if getattr(value, "__module__", None) in ("subprocess", "tests.ranks"):
            return True
        ours = isinstance(value, types.FunctionType) and value.__module__.startswith(LOOKED_INTO)
        if ours and value not in seen and _reaches(value, seen):
            return True
    return False


LOOKED_INTO = ("tests.", "tools.", "trainer.bench.")


def _named(function: types.FunctionType) -> list[Any]:
    """What the names in a function's code may mean: globals, and what modules among them have."""
    names = _names(function.__code__)
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    modules = [v for v in values if isinstance(v, types.ModuleType) and v not in STARTERS]
    modules = [v for v in modules if f"{v.__name__}.".startswith(LOOKED_INTO)]
    values += [getattr(module, name) for module in modules for name in names & vars(module).keys()]
    return [getattr(value, "__wrapped__", value) for value in values]


def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


# -- what imports what has changed --------------------------------------------------------------


@cache
def changed_tests(root: Path) -> frozenset[Path]:
    """The files of tests that import, at whatever distance, a file that is not as on `main`.

    The rules of the house always; all tests where a change is one that no import shows.
    """
    files = [root / name for name in changed_names(root)]
    sources = frozenset(p for r in PACKAGES for p in (root / r).rglob("*.py"))
    everything = {path for path in sources if path.name.startswith("test_")}
    if any(path.suffix != ".md" and path not in sources for path in files):
        return frozenset(everything)
    if sources & set(files) & {root / "tests" / name for name in OF_ALL_TESTS}:
        return frozenset(everything)
    asked = dependants(root, files) | set((root / "tests/house").glob("test_*.py"))
    return frozenset(everything & asked)


PACKAGES = ("trainer", "tests", "tools")
OF_ALL_TESTS = ("conftest.py", "lanes.py", "shapes.py")


def changed_names(root: Path) -> Sequence[str]:
    """Files that differ from where this branch left `main`, and new ones."""
    base = _git(root, "merge-base", "HEAD", "main") or ["HEAD"]
    changed = _git(root, "diff", "--name-only", base[0])
    return sorted({*changed, *_git(root, "ls-files", "--others", "--exclude-standard")})


def _git(root: Path, *command: str) -> list[str]:
    found = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
    return found.stdout.splitlines()


def dependants(root: Path, files: Sequence[Path]) -> set[Path]:
    """The files themselves and all that import them, directly or not."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    modules = {_module(path.relative_to(root)): path for path in paths}
    importers: dict[Path, set[Path]] = {}
    for path in paths:
        for needed in needed_files(path, root, modules):
            importers.setdefault(needed, set()).add(path)
    found, open_files = set(files), list(files)
    while open_files:
        new = importers.get(open_files.pop(), set()) - found
        found |= new
        open_files += new
    return found


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def needed_files(path: Path, root: Path, modules: Mapping[str, Path]) -> set[Path]:
    """What a file imports; as strings: files by their path, `trainer` and modules of `tests` as
    programs, and of `f"trainer.recipes.{name}"` all that it may mean."""
    names, needed = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if text == "trainer":
                names.add("trainer.__main__")
            elif text.endswith(".") and text.startswith("trainer."):
                names |= {name for name in modules if name.startswith(text)}
            elif text.startswith("tests.") and text in modules:
                names.add(text)
            elif re.fullmatch(r"[\w./-]+\.\w+", text):
                needed.add(root / text)
    packages = {name[:place] for name in names for place in range(len(name)) if name[place] == "."}
    return needed | {modules[name] for name in names | packages if name in modules}
