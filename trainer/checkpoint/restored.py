"""A checkpoint as it is read: its state and texts at once, its tensors when asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from trainer.checkpoint.manifest import STATE, FileEntry, Manifest
from trainer.errors import CheckpointError

_KINDS = {"progress": dict, "losses": list, "left_out": list, "evaluations_due": list}
"""Of the keys of a state that a run reads."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint whose every byte has been checked. Tensors are read when asked for."""

    folder: Path
    manifest: Manifest
    state: dict[str, Any]
    texts: Mapping[str, str]

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(f.group for f in self.manifest.files if f.group is not None))

    def names(self, group: str) -> list[str]:
        return [name for entry in self._files(group) for name in entry.tensors]

    def tensors(self, group: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a group, whichever rank wrote it, one at a time, on the host."""
        for entry in self._files(group):
            yield from self._read(entry, list(entry.tensors))

    def tensor(self, group: str, name: str) -> Tensor:
        for entry in self._files(group):
            if name in entry.tensors:
                return next(self._read(entry, [name]))[1]
        raise CheckpointError(f"{self.folder} has no tensor {name} in its group {group}")

    def lazily(self, group: str) -> OnDisk:
        """A group's tensors by name, each read again whenever it is asked for."""
        return OnDisk({n: entry for entry in self._files(group) for n in entry.tensors}, self)

    def _stretch(self, entry: FileEntry, name: str, begin: int, end: int) -> Tensor:
        """Values of a tensor in a row, of which no more than the rows they lie in are read."""
        shape = entry.tensors[name].shape
        if not shape:
            return next(self._read(entry, [name]))[1].reshape(1)[begin:end]
        width = max(math.prod(shape[1:]), 1)
        first = begin // width
        with _told(self.folder / entry.name) as path, safetensors.safe_open(path, "pt") as file:
            rows: Tensor = file.get_slice(name)[first : -(-end // width)]
            return rows.reshape(-1)[begin - first * width : end - first * width].clone()

    def _files(self, group: str) -> list[FileEntry]:
        return [entry for entry in self.manifest.files if entry.group == group]

    def _read(self, entry: FileEntry, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        with _told(self.folder / entry.name) as path, safetensors.safe_open(path, "pt") as file:
            for name in names:
                # A copy: a part may keep it for longer than the file exists.
                yield name, file.get_tensor(name).clone()


class OnDisk(Mapping[str, Tensor]):
    """Tensors by name, of which nothing is held."""

    def __init__(self, entries: Mapping[str, FileEntry], restored: Restored) -> None:
        self._entries = entries
        self._restored = restored

    def __getitem__(self, name: str) -> Tensor:
        return next(self._restored._read(self._entries[name], [name]))[1]

    def stretch(self, name: str, begin: int, end: int) -> Tensor:
        """The values begin to end - 1 of a tensor in a row; fewer where it ends before."""
        return self._restored._stretch(self._entries[name], name, begin, end)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@contextmanager
def _told(path: Path) -> Iterator[Path]:
    """Within it, what a file can't give is said as a CheckpointError."""
    try:
        yield path
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def open_checkpoint(folder: Path, manifest: Manifest) -> Restored:
    """Read the state and texts of a verified checkpoint; ValueError if the state is no mapping."""
    texts = {f.name: (folder / f.name).read_text() for f in manifest.files if f.group is None}
    try:
        state = json.loads(texts.pop(STATE))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{STATE}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is not a mapping")
    for key, kind in _KINDS.items():
        if key in state and not isinstance(state[key], kind):
            raise ValueError(f"{STATE} has {key} that is a {type(state[key]).__name__}")
    if not all(type(count) is int and count >= 0 for count in state.get("progress", {}).values()):
        raise ValueError(f"{STATE} has a progress that is no count")
    return Restored(folder, manifest, state, texts)
