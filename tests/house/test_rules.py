"""The rules of the house that a machine can hold."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("trainer/**/*.py"), *ROOT.glob("tools/*.py")])

# A module may import its own layer and those above it in this list. What is not listed is a
# program: it may import everything.
LAYERS = [
    {"errors", "types", "hashing", "kernels"},
    {"comm", "recipe_files", "command"},
    {"config", "stop", "losses"},
    {"models", "data", "store", "periods"},
    {"engine", "recipe", "teachers", "export"},
    {"evals", "checkpoint", "log"},
    {"cluster", "pictures", "run"},
    {"parts", "programs", "loop"},
    {"recipes"},
]
KEPT_TO = {
    "deepspeed": {"trainer/engine/"},
    "triton": {"trainer/kernels/"},
    "torch.distributed": {"trainer/comm.py", "trainer/engine/"},
    "torchvision": set(),
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_FOLDERS = {"utils", "helpers", "misc"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(module: str) -> int | None:
    name = module.removeprefix("trainer.").split(".")[0]
    return next((number for number, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_packages_stay_in_their_place(path):
    relative = str(path.relative_to(ROOT))
    own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imported(path):
        if name.startswith("trainer.") and own is not None and relative.startswith("trainer/"):
            other = layer_of(name)
            assert other is not None, f"{relative} imports the program {name}"
            assert other < own or name.split(".")[1] == path.relative_to(ROOT).parts[
                1
            ].removesuffix(".py"), f"{relative} (layer {own}) imports {name} (layer {other})"
        for package, places in KEPT_TO.items():
            if name == package or name.startswith(f"{package}."):
                assert any(relative.startswith(place) for place in places), (
                    f"{relative} imports {name}, which belongs in {sorted(places) or 'no file'}"
                )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_call_runs_code_from_data(path):
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in FORBIDDEN_CALLS, f"{path}:{node.lineno} calls {name}"
        assert name not in {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}
        assert name != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("allow_pickle", "False") == "False"
        assert keywords.get("shell", "False") == "False"
        assert keywords.get("trust_remote_code", "False") == "False"
        assert not name.endswith(".extractall"), f"{path}:{node.lineno} unpacks an archive"


def test_no_folder_or_class_has_a_name_that_says_nothing():
    for path in SOURCES:
        assert not FORBIDDEN_FOLDERS & {part.removesuffix(".py") for part in path.parts}
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                assert not re.match(r"Base[A-Z]|.*Manager$", node.name), f"{path}: {node.name}"


def test_a_tool_hides_no_module_of_the_standard_library():
    """`python tools/x.py` puts tools/ first on the path, so tools/inspect.py would be `inspect`."""
    import sys

    names = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


def test_no_tracked_file_is_large_and_the_project_speaks_of_itself_alone():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    foreign = re.compile(r"\.\./" + "shared|/work" + "/|--index" + "-url|/ro" + "ot/")
    for name in filter(None, tracked):
        path = ROOT / name
        if not path.exists():
            continue
        assert path.stat().st_size <= 1 << 20, f"{name} is {path.stat().st_size} bytes"
        if path.suffix in {".py", ".md", ".sh", ".yaml", ".json", ".toml", ".txt"}:
            found = foreign.search(path.read_text())
            assert not found, f"{name} speaks of a machine: {found and found[0]}"


def test_every_configuration_key_is_read_by_some_code():
    """A key that is parsed and ignored is a lie."""
    from trainer import config

    text = "\n".join(path.read_text() for path in SOURCES)
    for name in dir(config):
        section = getattr(config, name)
        if isinstance(section, type) and issubclass(section, config.Frozen):
            for key in section.model_fields:
                assert re.search(rf"\.{key}\b", text), f"{name}.{key} is read nowhere"
