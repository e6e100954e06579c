"""docs/troubleshooting.md: every sentence that ends a program, found in the code, with its mend."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ERRORS = frozenset({"ConfigError", "DataError", "CheckpointError", "NonFiniteLoss"})

_HEAD = """\
# Troubleshooting

A mistake in a run file, in data or in a checkpoint ends a program with one sentence behind `error:`
and exit code 2. Nothing that was saved is lost. Exit code 1 with a traceback is our bug.

## What people meet first

* **It stands still before the first step.** A rank waits for the others. After a minute it says for
  whom. Look whether that host runs, and whether `MASTER_ADDR:MASTER_PORT` can be reached from here.
* **`CUDA out of memory`.** Set `micro_batch` lower: the gradient stays the same. Then
  `gradient_checkpointing=true`, then `deepspeed=ds_configs/zero3_offload.json`.
* **A step takes long and `data wait` is high.** Raise `data.workers`; with small data set
  `data.cache_mib`. Without a GPU, the decoding of JPEGs competes with the model.
* **The loss is `NaN`, or steps are skipped.** The line names rank, samples and term. Lower
  `optim.learning_rate`, lengthen `optim.warmup_steps`, or leave these samples out.
* **`no index`.** Write one beside each shard: `python tools/index.py 'shards/{000..127}.tar'`.
* **A run was killed.** The same command goes on from the newest whole checkpoint.
* **DeepSpeed prints too little or too much.** Its lines of INFO are off. Its launcher's come back
  with `--log_level info`.
* **`wandb` asks for a login.** Run `wandb login`, or set `WANDB_MODE=offline`.
* **`torchvision::nms does not exist`.** A torchvision that was built for another torch lies in the
  environment. The trainer needs none: `pip uninstall torchvision`.

## Every sentence

Written by `python tools/pages.py` from the code; a test compares. `...` stands for what was found.
Where a sentence says what to do, do that. Where it only says what is wrong, this helps:

"""

_MENDS = {
    "bench": "change the benchmark's options; `--help` lists them",
    "checkpoint": "the folder is damaged or of another run; an older checkpoint is tried by "
    "itself, else give another `workdir`",
    "cluster": "change the options of `tools/cluster.py`, or the keys of the clustering",
    "settings": "change the key in the run file, or on the command line",
    "curation": "change the options or the list that the sentence names",
    "data": "look at the shard or the sample that is named; write its index anew if it has changed",
    "engine": "change the DeepSpeed file, or choose one of `ds_configs/`",
    "evals": "change the evaluation's keys; its data need what the sentence names",
    "export": "export in another form, or from another checkpoint",
    "models": "give the folder or the setting that the sentence asks for",
    "parts": "change the recipe's keys, or make the labels or vectors again",
    "programs": "change the options of the command",
    "recipes": "change the recipe's keys",
    "scaling": "change the plan, or the runs that it reads",
    "store": "make the vectors again with `tools/embed.py`, or give another folder",
    "teachers": "change the teacher's settings, or its folder",
    "tools": "change the options of the command; `--help` shows an example",
}
_OTHERWISE = "change what the sentence names"


class Message(NamedTuple):
    """One sentence of the code."""

    room: str
    text: str
    """With `...` for what is only known when it happens."""


def troubleshooting_page() -> str:
    """The whole page."""
    found: dict[str, list[str]] = {}
    for message in messages():
        said = found.setdefault(message.room, [])
        if message.text not in said:
            said.append(message.text)
    parts = [_HEAD]
    for room in sorted(found):
        parts.append(f"### {room}\n\nOtherwise: {_MENDS.get(room, _OTHERWISE)}.\n")
        parts.append("\n".join(_bullet(text) for text in sorted(found[room])) + "\n")
    return "\n".join(parts)


def messages() -> Iterator[Message]:
    """Of every error that is meant for a user, in the order of the files."""
    for path in sorted([*ROOT.glob("trainer/**/*.py"), *ROOT.glob("tools/*.py")]):
        folder, *inside = path.relative_to(ROOT).parts
        room = folder if folder == "tools" else inside[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _name(node.func) in ERRORS and node.args:
                text = _text(node.args[0])
                if _says_something(text):
                    yield Message(room, text)


def first_words(text: str) -> str:
    """By which a sentence is looked up: its longest stretch that is always the same."""
    return max((part.strip() for part in text.split("...")), key=len)[:40].strip()


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [_text(v) if isinstance(v, ast.Constant) else "..." for v in node.values]
        return re.sub(r"(\.\.\.)+", "...", " ".join("".join(parts).split()))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "..."


def _says_something(text: str) -> bool:
    return len(re.findall(r"[a-z]{2,}", text.replace("...", " "))) >= 2


def _bullet(text: str) -> str:
    return textwrap.fill(
        f"* {text}", 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
