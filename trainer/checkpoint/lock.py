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


def _locked(workdir: Path) -> IO[str] | None:
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        return file
    with suppress(OSError):  # on a full disk the lock holds all the same
        file.truncate(0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    return file
