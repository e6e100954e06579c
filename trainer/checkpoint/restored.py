"""A checkpoint as it is read: its state and texts at once, its tensors when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from trainer.checkpoint.manifest import STATE, FileEntry, Manifest
from trainer.errors import CheckpointError


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

    def lazily(self, group: str) -> Mapping[str, Tensor]:
        """A group's tensors by name, each read again whenever it is asked for."""
        return _OnDisk({n: entry for entry in self._files(group) for n in entry.tensors}, self)

    def _files(self, group: str) -> list[FileEntry]:
        return [entry for entry in self.manifest.files if entry.group == group]

    def _read(self, entry: FileEntry, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            with safetensors.safe_open(self.folder / entry.name, framework="pt") as file:
                for name in names:
                    # A copy: a part may keep it for longer than the file exists.
                    yield name, file.get_tensor(name).clone()
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self.folder / entry.name} can't be read: {error}") from error


class _OnDisk(Mapping[str, Tensor]):
    def __init__(self, entries: Mapping[str, FileEntry], restored: Restored) -> None:
        self._entries = entries
        self._restored = restored

    def __getitem__(self, name: str) -> Tensor:
        return next(self._restored._read(self._entries[name], [name]))[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def open_checkpoint(folder: Path, manifest: Manifest) -> Restored:
    """Read the state and texts of a verified checkpoint; ValueError if the state is no mapping."""
    texts = {f.name: (folder / f.name).read_text() for f in manifest.files if f.group is None}
    try:
        state = json.loads(texts.pop(STATE))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{STATE}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} is not a mapping")
    return Restored(folder, manifest, state, texts)
