"""Commands that pages, helps and run files show, and the program's own parsers of them."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config import load_run
from trainer.plan.told import read_words

ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(
    r"(?:^|\s)(?:\S*/)?(tools/\w+\.py|launch/\w+\.sh|-m trainer|--module trainer)\b"
)
STANDS_FOR_A_RUN = ("RUN.yaml", "STUDY.yaml", "GRID.yaml")
UNKNOWN = ("HOSTFILE",)


class Parsed(BaseException):
    """A tool's own parser has understood its command line; nothing behind it is run."""


def shown_in(path: Path) -> list[str]:
    """Every command of a page, a run file or a program's help, one string each."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = _code_of_page(text)
    elif path.suffix == ".yaml":
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    else:
        lines = [line.strip() for line in (ast.get_docstring(ast.parse(text)) or "").splitlines()]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [line for line in map(_command, whole.splitlines()) if line]


def _code_of_page(text: str) -> list[str]:
    """Lines of blocks, and code in the middle of a sentence."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.M)
    blocks = [code for language, code in fenced if language in ("", "bash", "sh")]
    indented = re.findall(r"^ {4}(\S.*(?:\\\n.*)*)$", text, re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line for part in (*blocks, *indented, *spans) for line in part.splitlines()]


def _command(line: str) -> str:
    """What is typed of a line; nothing where it only names a program."""
    found = re.search(r"\b(?:python|bash|deepspeed|torchrun|sbatch)\s.*", line)
    if found is None or not PROGRAM.search(found[0]):
        return ""
    typed = re.split(r"[,;] then\b", found[0])[0].rstrip("`")
    return typed if typed.endswith("...") else typed.rstrip(" .")


def refused(command: str) -> str:
    """Why the program would not take a command; nothing where it would."""
    try:
        words = shlex.split(re.sub(r"\s+\(.*\)$|; done$", "", command), comments=True)
    except ValueError as error:
        return f"{command}: {error}"
    if words[-1] == "...":  # the rest is said elsewhere
        words = words[: 1 + max(n for n, word in enumerate(words) if PROGRAM.search(f" {word}"))]
        return "" if (ROOT / words[-1]).exists() else f"{command}: no {words[-1]}"
    words = [word for word in words if word not in UNKNOWN and not word.endswith("=...")]
    try:
        _read(words)
    except Parsed:
        return ""
    except SystemExit as ended:
        return f"{command}: its parser refuses it" if ended.code else ""  # 0: it was --help
    except Exception as error:
        return f"{command}: {type(error).__name__} {error}"
    return ""


def _read(words: Sequence[str]) -> None:
    for place, word in enumerate(words):
        name = word.removeprefix("./")
        if re.fullmatch(r"tools/\w+\.py", name):
            return _parse(ROOT / name, words[place + 1 :])
        if name == "trainer" and words[place - 1] in ("-m", "--module"):
            return _read_run(words[place + 1 :])
        if name in ("launch/local.sh", "launch/slurm.sh"):
            return _read_run(words[place + 1 :])
        if name == "launch/multinode.sh":
            rest = words[place + 1 :]
            return _read_run(rest[0 if rest[:1] and rest[0].endswith(".yaml") else 1 :])
        if re.fullmatch(r"launch/\w+\.sh", name) and not (ROOT / name).exists():
            raise FileNotFoundError(name)
    return None


def _read_run(words: Sequence[str]) -> None:
    """As `python -m trainer` does, up to where it would begin."""
    if not words or words[0].startswith("-"):
        return
    if words[0] == "doctor":
        words = words[1:]
        ranks = [place for place, word in enumerate(words) if word == "--ranks"]
        words = [w for n, w in enumerate(words) if not any(n in (p, p + 1) for p in ranks)]
    plan = words.index("--plan") if "--plan" in words else len(words)
    run, *overrides = words[:plan] or ["RUN.yaml"]
    read_words(words[plan + 1 :])
    if run == "[RUN.yaml]" or "key=value" in " ".join(overrides):
        return
    overrides = [word for word in overrides if "=" in word]
    own = run in STANDS_FOR_A_RUN or not run.startswith("launch/") or run.endswith("slip.yaml")
    load_run(ROOT / ("launch/runs/clip.yaml" if own else run), overrides)


def _parse(tool: Path, words: Sequence[str]) -> None:
    """By the tool's own parser, which is stopped when it has understood."""
    spec = importlib.util.spec_from_file_location(f"tool_{tool.stem}", tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    kept = sys.argv, sys.path[:]
    sys.argv = [tool.name, *_without_alternatives(words)]
    try:
        with _StoppedParsers(first=tool.stem != "bench"):
            spec.loader.exec_module(module)
            module.main()
    finally:
        sys.argv, sys.path[:] = kept


def _without_alternatives(words: Sequence[str]) -> Iterator[str]:
    """`step|data|scale` is one of them; what stands in brackets may be left out."""
    for word in words:
        if not word.startswith("["):
            yield word.partition("|")[0] if re.fullmatch(r"[\w|-]+", word) else word


class _StoppedParsers:
    """Inside, a parser that has understood raises `Parsed`; with `first=False` the second does."""

    NAMES = ("parse_args", "parse_intermixed_args")

    def __init__(self, *, first: bool) -> None:
        self.calls = 1 if first else 0

    def __enter__(self) -> None:
        self.kept = {name: getattr(argparse.ArgumentParser, name) for name in self.NAMES}
        for name, real in self.kept.items():
            setattr(argparse.ArgumentParser, name, self._stopped(real))

    def _stopped(self, real: Any) -> Any:
        def parse(*arguments: Any, **more: Any) -> Any:
            found = real(*arguments, **more)
            self.calls += 1
            if self.calls > 1:
                raise Parsed
            return found

        return parse

    def __exit__(self, *_: object) -> None:
        for name, real in self.kept.items():
            setattr(argparse.ArgumentParser, name, real)
