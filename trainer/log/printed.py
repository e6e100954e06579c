"""`log.txt` in the workdir: every line that a run has printed, with its time, over all starts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.addresses import without_secrets
from trainer.comm import Comm
from trainer.data.waiting_file import WaitingFile
from trainer.errors import TrainerError
from trainer.long_work import Standard, speaking_to

PRINTED = "log.txt"


class Printed:
    """Opened by the first line, behind those of earlier starts. A full disk stops nothing."""

    def __init__(self, workdir: Path) -> None:
        self._file = WaitingFile(workdir / PRINTED)

    def line(self, text: str) -> None:
        now, text = time.strftime("%Y-%m-%d %H:%M:%S"), without_secrets(text)
        self._file.append("".join(f"{now}  {each}\n" for each in text.splitlines()).encode())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def note(workdir: Path, text: str) -> None:
    """One line by itself, from a thread that may end the process behind it."""
    printed = Printed(workdir)
    printed.line(text)
    printed.close()


@contextmanager
def told_to_log(workdir: Path, comm: Comm) -> Iterator[None]:
    """What is told before a run's log begins, the sentence of a mistake too, stands in it."""
    printed = Printed(workdir) if comm.is_main else None
    try:
        with speaking_to(Standard(), printed.line if printed else None):
            yield
    except TrainerError as error:
        if printed:
            printed.line(f"error: {error}")
        raise
    finally:
        if printed:
            printed.close()
