"""The rules of the house that a machine can hold."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("trainer/**/*.py"), *ROOT.glob("tools/*.py")])

# The rooms of trainer/ from the ground up: packages, and the files at its top level. An import goes
# to a room further up in this list or stays in its own. A new room needs a place here.
ROOMS = (
    *("addresses", "errors", "tensor_files", "types", "hashing", "pulse", "long_work", "kernels"),
    *("launchers", "meeting", "together", "adjoints", "comm"),
    *("prompt_templates", "settings", "config", "command"),
    *("watch", "stop", "periods", "losses", "data", "models", "store", "concepts"),
    *("teachers", "engine", "recipe", "export", "log", "checkpoint", "evals", "tuning", "cluster"),
    *("curation", "pictures", "parts", "run", "recipes", "plan", "scaling", "running", "loop"),
    *("doctor", "programs", "bench", "__main__"),
)
KEPT_TO = {
    "deepspeed": {"trainer/engine/"},
    "triton": {"trainer/kernels/"},
    "torch.distributed": {
        "trainer/adjoints.py",
        "trainer/comm.py",
        "trainer/meeting.py",
        "trainer/together.py",
        "trainer/watch/",
        "trainer/engine/",
    },
    "torchvision": set(),
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_FOLDERS = {"utils", "helpers", "misc"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms that full module names belong to."""
    return {name.split(".")[1] for name in names if name.startswith("trainer.")}


def test_imports_go_down_or_stay_in_their_room():
    assert not [told for path in SOURCES for told in climbs(path)]


def climbs(path: Path) -> Iterator[str]:
    folder, *inside = path.relative_to(ROOT).parts
    if folder != "trainer" or inside == ["__init__.py"]:
        return
    own = inside[0].removesuffix(".py")
    if own not in ROOMS:
        yield f"trainer/{inside[0]} has no place in ROOMS yet"
        return
    above = [room for room in rooms_of(imported(path)) - {own} if room not in ROOMS[: place(own)]]
    if above:
        yield f"{path.relative_to(ROOT)} imports {above}, which stand above {own}"


def place(room: str) -> int:
    return ROOMS.index(room)


def test_every_room_exists():
    trainer = ROOT / "trainer"
    found = {path.stem for path in trainer.glob("*.py")} | {
        path.name for path in trainer.iterdir() if (path / "__init__.py").exists()
    }
    assert set(ROOMS) == found - {"__init__"}


def test_packages_stay_in_their_place():
    assert not [told for path in SOURCES for told in strays(path)]


def strays(path: Path) -> Iterator[str]:
    relative = str(path.relative_to(ROOT))
    for name in imported(path):
        for package, places in KEPT_TO.items():
            is_it = name == package or name.startswith(f"{package}.")
            if is_it and not any(relative.startswith(place) for place in places):
                yield f"{relative} imports {name}, which belongs in {sorted(places) or 'no file'}"


def test_no_call_runs_code_from_data():
    calls = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 5000
    found = [(path, node) for path, node in calls if runs_code_from_data(node)]
    assert not [f"{path}:{node.lineno} calls {ast.unparse(node.func)}" for path, node in found]


def runs_code_from_data(node: ast.Call) -> bool:
    name = ast.unparse(node.func)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    switches = ("allow_pickle", "shell", "trust_remote_code")
    return (
        name in FORBIDDEN_CALLS
        or name in {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}
        or (name == "torch.load" and keywords.get("weights_only") != "True")
        or any(keywords.get(key, "False") != "False" for key in switches)
        or name.endswith(".extractall")
    )


def test_the_rule_knows_what_runs_code_from_data():
    for text in ("eval(x)", "yaml.load(f)", "torch.load(f)", "np.load(f, allow_pickle=True)"):
        assert runs_code_from_data(ast.parse(text).body[0].value)
    assert not runs_code_from_data(ast.parse("torch.load(f, weights_only=True)").body[0].value)


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
