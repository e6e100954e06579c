"""One run per workdir: a second one that is started there is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from trainer.comm import Comm
from trainer.errors import ConfigError


@contextmanager
def sole_user(workdir: Path, comm: Comm) -> Iterator[None]:
    """Hold the workdir for this run; ConfigError on all ranks if another run holds it.

    The lock is the operating system's and ends with the process, however that ends. A disk that
    knows no locks (some network ones) is taken as free.
    """
    file, failure = None, None
    if comm.is_main:
        try:
            file = _locked(workdir)
        except OSError as error:
            failure = f"can't use the workdir {workdir}: {error.strerror} ({error.filename})"
    if failure := comm.broadcast_json(failure):
        raise ConfigError(failure)
    if comm.any(comm.is_main and file is None):
        raise ConfigError(
            f"another run is using {workdir} (its process is in {workdir / 'lock'}); "
            "wait for it, stop it, or choose another workdir"
        )
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _locked(workdir: Path, name: str = "lock", *, write: bool = True) -> IO[str] | None:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / name).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return file
    if not write:
        return file
    with suppress(OSError):  # on a full disk the lock holds all the same
        file.truncate(0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file


@contextmanager
def only_worker(workdir: Path) -> Iterator[bool]:
    """Hold a workdir for whoever starts its runs; false inside if somebody else does."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = _locked(workdir, "worker-lock")
    try:
        yield file is not None
    finally:
        if file is not None:
            file.close()


def holder_of(workdir: Path) -> str | None:
    """Which process trains in a workdir, in words; None where none does."""
    if not (workdir / "lock").exists():
        return None
    file = _locked(workdir, write=False)
    if file is not None:
        file.close()
        return None
    with suppress(OSError):
        return f"process {(workdir / 'lock').read_text().strip()}"
    return "another process"
