"""What must be equal on all hosts of a run: its code, its packages, its configuration."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.log.environment import ROOT, versions
from trainer.together import Facts

CODE = ("*.py", "*.json", "*.txt")


def facts_of(config: RunConfig) -> list[Facts]:
    """Of this host; cheap enough for every start (a few hundred small files are hashed)."""
    settings = flat(config.model_dump(mode="json"))
    return [
        Facts("code", "use the same checkout on every host", code_of(ROOT)),
        Facts("package", "install the same requirements.txt on every host", _packages()),
        Facts("setting", "give every rank the same RUN.yaml and overrides", settings),
        Facts("file", "copy it to every host", _files(config)),
    ]


def code_of(root: Path) -> dict[str, str]:
    """Digest of each file of `trainer/`, by its path."""
    paths = [path for pattern in CODE for path in (root / "trainer").rglob(pattern)]
    return {str(path.relative_to(root)): _digest(path) for path in sorted(paths)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A tree of settings by dotted keys."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = str(value)
    return found


def _packages() -> dict[str, str]:
    return {"python": platform.python_version(), **versions()}


def _files(config: RunConfig) -> dict[str, str]:
    path = config.deepspeed
    return {str(path): _digest(path) if path.is_file() else "missing"}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
