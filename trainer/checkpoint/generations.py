"""The checkpoints in a folder, by age: what a new one is called, and which old ones go."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint.manifest import parse_manifest, read_manifest_bytes

_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


class Generation(NamedTuple):
    """Ordered by age."""

    step: int
    attempt: int
    folder: Path


def generations(folder: Path) -> list[Generation]:
    """All checkpoints of a folder, damaged or not, oldest first."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(Generation(int(m[1]), int(m[2] or 0), path) for m, path in matches if m)


def free_name(folder: Path, step: int) -> str:
    """`step-00000120`, or `step-00000120-1` where that exists (a damaged one, say)."""
    taken = [found.attempt for found in generations(folder) if found.step == step]
    return f"step-{step:08d}" + (f"-{max(taken) + 1}" if taken else "")


def prune(folder: Path, newest: Path, *, keep: int, refused: Collection[str]) -> None:
    """Remove what is older than the `keep` newest, if `newest` reads back well.

    Checkpoints of later steps belong to a future that this run has left (they were refused
    when it started); they go as soon as there are `keep` others.
    """
    if not _is_listed_in_full(newest):
        return
    found = generations(folder)
    last = next(each for each in found if each.folder == newest)
    sound = [each for each in found if each <= last and each.folder.name not in refused]
    kept = sound[-keep:]
    if len(kept) == keep:
        for each in found:
            if each not in kept:
                _discard(each.folder)


def _discard(folder: Path) -> None:
    """Rename first, so that a half-removed checkpoint is never taken for one."""
    old = folder.parent / f".old-{folder.name}-{secrets.token_hex(4)}"
    try:
        os.replace(folder, old)
    except OSError:
        return  # it costs space and nothing else; the next save tries again
    shutil.rmtree(old, ignore_errors=True)


def _is_listed_in_full(folder: Path) -> bool:
    """Read the manifest back and compare the sizes."""
    try:
        files = parse_manifest(read_manifest_bytes(folder)).files
        return all((folder / entry.name).stat().st_size == entry.size for entry in files)
    except (OSError, ValueError):
        return False
