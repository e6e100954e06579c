"""Trainings of a sweep as real processes that cost no import: they fork off one that has done it.

`Launcher.command` is what a study's `launcher` names: a small program that asks this process for a
training and ends with its exit code.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

from tests.ranks import _context

_CLIENT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect(sys.argv[1])
    line.sendall((sys.argv[3] + "\\n").encode())
    sys.exit(int(line.makefile().readline() or 9))
"""


class Launcher:
    """Serves trainings until it is left; `pids` are of those that have begun, by run file."""

    def __init__(self, folder: Path) -> None:
        self.pids: dict[str, int] = {}
        self.started: list[str] = []
        self._place = str(folder / "launcher")
        self._server = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-S", "-c", _CLIENT, self._place]

    def __enter__(self) -> Launcher:
        self._server.bind(self._place)
        self._server.listen()
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._server.accept()
            except OSError:
                return
            with line:
                path = line.makefile().readline().strip()
                self.started.append(path)
                process = _context.Process(target=_train, args=(path,))
                process.start()
                self.pids[path] = process.pid
                process.join()
                line.sendall(f"{abs(process.exitcode)}\n".encode())


def _train(path: str) -> None:
    from trainer.config import load_run
    from trainer.loop import train

    log = Path(path).with_name("output.log").open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    train(load_run(path))
