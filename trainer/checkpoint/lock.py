"""One run per workdir: a second one that is started there is refused."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    file = _locked(workdir) if comm.is_main else None
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
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
