"""The files of one checkpoint: safetensors and JSON, each listed with its size and SHA-256.

Nothing here knows of ranks talking to each other; `trainer/checkpoint.py` does that part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from trainer.config import Frozen
from trainer.pulse import PULSE
from trainer.types import NamedTensors

MANIFEST = "manifest.json"
SUM = "manifest.sha256"
STATE = "state.json"
MAX_MANIFEST_BYTES = 256 << 20
_READ_BYTES = 16 << 20
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)]


class TensorEntry(Frozen):
    """One tensor in a file: shape, dtype, and where its bytes are and what they sum up to."""

    shape: tuple[Annotated[int, Field(ge=0)], ...]
    dtype: str
    begin: int = Field(default=0, ge=0, lt=2**62)
    """The first of its bytes in the file."""
    end: int = Field(default=0, ge=0, lt=2**62)
    crc32: int | None = None
    """Tells which tensor is damaged, once the file's SHA-256 has told that one is. None in
    checkpoints of before this and the place were recorded."""


class FileEntry(Frozen):
    """One file: what it weighs, its hash and the tensors in it."""

    name: PlainName
    size: int = Field(ge=0)
    """Bytes."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    group: PlainName | None = None
    """None for JSON and texts."""
    tensors: dict[str, TensorEntry] = Field(default_factory=dict)


class Manifest(Frozen):
    """Everything a checkpoint consists of."""

    format: Literal["protoscale-checkpoint-1"] = "protoscale-checkpoint-1"
    step: int = Field(ge=0)
    world_size: int = Field(gt=0)
    """Ranks that wrote it. Any number of ranks may read it."""
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _names_are_unique_and_a_state_is_among_them(self) -> Manifest:
        names = [entry.name for entry in self.files]
        if len(set(names)) != len(names) or names.count(STATE) != 1:
            raise ValueError(f"must list every file once, and {STATE}")
        return self


class Share(Frozen):
    """What one rank has written, or why it could not."""

    files: tuple[FileEntry, ...] = ()
    size: int = 0
    """Bytes of this rank's tensors and texts, whether they could be written or not."""
    doubled: tuple[str, ...] = ()
    """Names this rank was given twice."""
    failure: str | None = None


class ShareWriter:
    """Writes the files of one rank into `folder`, tensor by tensor.

    A file is closed before it outgrows `file_bytes` (one larger tensor gets a file of its own), so
    never more than that is held in memory. After the first OSError nothing more is written, but
    tensors are still taken: making the next one may be a collective in which other ranks wait.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, file_bytes: int) -> None:
        self._folder = folder
        self._suffix = f"{rank + 1:05d}-of-{world_size:05d}"
        self._file_bytes = file_bytes
        self._files: list[FileEntry] = []
        self._size = 0
        self._doubled: list[str] = []
        self._failure: str | None = None

    @property
    def share(self) -> Share:
        return Share(
            files=tuple(self._files),
            size=self._size,
            doubled=tuple(self._doubled),
            failure=self._failure,
        )

    def group(self, group: str, tensors: NamedTensors) -> None:
        """Write `<group>-00001-of-00004.safetensors`, and `...-1.safetensors` where one is full."""
        pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
        pending: dict[str, Tensor] = {}
        seen: set[str] = set()
        held = part = 0
        for name, tensor in pairs:
            PULSE.beat()
            self._size += tensor.nbytes
            if name in seen:
                self._doubled.append(f"{group}/{name}")
            seen.add(name)
            if pending and held + tensor.nbytes > self._file_bytes:
                self._write_tensors(group, part, pending)
                pending, held, part = {}, 0, part + 1
            if self._failure is None:
                pending[name] = _on_host(tensor)
                held += tensor.nbytes
        if pending:
            self._write_tensors(group, part, pending)

    def text(self, name: str, text: str) -> None:
        data = text.encode()
        self._size += len(data)
        self._write(FileEntry(name=name, size=len(data), sha256=_hash(data)), data)

    def _write_tensors(self, group: str, part: int, tensors: Mapping[str, Tensor]) -> None:
        data = safetensors.torch.save(dict(tensors))
        entry = FileEntry(
            name=f"{group}-{self._suffix}{f'-{part}' if part else ''}.safetensors",
            size=len(data),
            sha256=_hash(data),
            group=group,
            tensors=_tensor_entries(data, tensors),
        )
        self._write(entry, data)

    def _write(self, entry: FileEntry, data: bytes) -> None:
        if self._failure is not None:
            return
        try:
            write_durably(self._folder / entry.name, data)
        except OSError as error:
            self._failure = f"{error.strerror or error} ({entry.name})"
        else:
            self._files.append(entry)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and, beside it, its own hash in the form `sha256sum -c` reads."""
    data = manifest.model_dump_json(indent=1).encode()
    write_durably(folder / MANIFEST, data)
    write_durably(folder / SUM, _sum_line(data))
    sync_folder(folder)


def read_manifest_bytes(folder: Path) -> bytes:
    """The manifest's bytes, checked against their hash; ValueError or OSError where not."""
    if (folder / MANIFEST).stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
    data = (folder / MANIFEST).read_bytes()
    with (folder / SUM).open("rb") as file:
        if file.read(1024) != _sum_line(data):
            raise ValueError(f"{MANIFEST} does not match its hash in {SUM}")
    return data


def parse_manifest(data: str | bytes) -> Manifest:
    """A validated manifest; ValueError in one line where it is none."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{MANIFEST}: {place}: {problem['msg']}") from error


def damage(folder: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, in words that name it; None where size and hash are right."""
    try:
        with (folder / entry.name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                return f"{entry.name} has {size} bytes instead of {entry.size}"
            found = hashlib.file_digest(file, "sha256").hexdigest()
            where = _damaged_part(file, entry) if found != entry.sha256 else ""
    except OSError as error:
        return f"{entry.name}: {error.strerror or error}"
    if found != entry.sha256:
        return f"{entry.name} has SHA-256 {found[:12]}... instead of {entry.sha256[:12]}...{where}"
    return None


def failure_of_copy(files: Sequence[FileEntry], source: Path, target: Path) -> str | None:
    """Copy files to another folder, on whose disk they are then, and read them back; what went
    wrong, in words, or None."""
    for entry in files:
        PULSE.beat()
        try:
            shutil.copyfile(source / entry.name, target / entry.name)
            with (target / entry.name).open("rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            return f"{error.strerror or error} ({entry.name})"
        if (problem := damage(target, entry)) is not None:
            return problem
    return None


def _damaged_part(file: BinaryIO, entry: FileEntry) -> str:
    """Which tensors of a damaged file no longer sum up; empty where the manifest can't tell."""
    if not entry.tensors or any(tensor.crc32 is None for tensor in entry.tensors.values()):
        return ""
    damaged = [
        name for name, tensor in entry.tensors.items() if _crc32(file, tensor) != tensor.crc32
    ]
    if not damaged:
        return " (in its header; every tensor is as it was)"
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return f" (in {', '.join(damaged[:3])}{more})"


def _crc32(file: BinaryIO, tensor: TensorEntry) -> int:
    total, left = 0, tensor.end - tensor.begin
    file.seek(tensor.begin)
    while left > 0 and (data := file.read(min(_READ_BYTES, left))):
        total, left = zlib.crc32(data, total), left - len(data)
    return total


def _tensor_entries(data: bytes, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Entries of the tensors in a safetensors file: eight bytes of length, a JSON header, data."""
    first = 8 + int.from_bytes(data[:8], "little")
    header, view = json.loads(data[8:first]), memoryview(data)
    entries = {}
    for name, tensor in tensors.items():
        begin, end = (first + offset for offset in header[name]["data_offsets"])
        entries[name] = TensorEntry(
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            begin=begin,
            end=end,
            crc32=zlib.crc32(view[begin:end]),
        )
    return entries


def write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make names that were created or renamed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that shares memory with nothing: the caller may reuse its buffer at once."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sum_line(data: bytes) -> bytes:
    return f"{_hash(data)}  {MANIFEST}\n".encode()
