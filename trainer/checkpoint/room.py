"""Can a checkpoint be written here at all? Asked before the first step."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.restored import Restored
from trainer.comm import Comm, agreed
from trainer.errors import CheckpointError

FLOAT = 4
"""Bytes of a value in a checkpoint."""


def check_room(folder: Path, comm: Comm, *, needed: int) -> None:
    """DataError on all ranks where one of them can't write into `folder`, does not see what rank 0
    writes there, or where fewer than `needed` bytes are free."""
    token = folder / ".trial"
    agreed(comm, lambda: _write(token) if comm.is_main else None)
    agreed(comm, lambda: _try(folder, token, comm.rank))
    agreed(comm, lambda: _compare(folder, token, needed) if comm.is_main else None)


def bytes_needed(
    restored: Restored | None, trained_parameters: int, *, averaged: bool = False
) -> int:
    """Size of the next checkpoint: that of the last one, or, before there is one, of weights,
    moments and an average of the weights (other parts come on top)."""
    if restored is not None:
        return sum(entry.size for entry in restored.manifest.files)
    return FLOAT * trained_parameters * (4 if averaged else 3)


def free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # the disk that failed may not answer this either
        return 0


def size_in_words(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _write(path: Path) -> None:
    """A few bytes, to the disk itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(b"trial\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise CheckpointError(
            f"can't save into {path.parent}: {error.strerror}; make room, mend it or choose "
            "another workdir"
        ) from error


def _try(folder: Path, token: Path, rank: int) -> None:
    if not token.exists():
        raise CheckpointError(
            f"{folder} is not the folder that rank 0 writes into; the workdir must be on a disk "
            "that all ranks see"
        )
    own = folder / f".trial-{rank}"
    _write(own)
    own.unlink()


def _compare(folder: Path, token: Path, needed: int) -> None:
    token.unlink()
    free = free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"a checkpoint needs about {size_in_words(needed)} and {size_in_words(free)} are free "
            f"in {folder}; make room or choose another workdir"
        )
