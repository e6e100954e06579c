"""A file that is only appended to, by whom a full disk must not stop.

What can't be written waits in memory and is tried again with whatever comes next; one line on the
terminal says so. A write that got half through is written over by the next try, so the file never
holds a torn record in its middle.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


class WaitingFile:
    """Opened by the first write, behind what is there already."""

    def __init__(self, path: Path, *, prepare: Callable[[Path], None] | None = None) -> None:
        """`prepare` is called before the file is opened, and again while it raises OSError."""
        self.path = path
        self._prepare = prepare
        self._descriptor: int | None = None
        self._end = 0
        self._waiting = b""
        self._warned = False

    def append(self, data: bytes) -> None:
        self._waiting += data
        self._write()

    def flush(self) -> None:
        """Put everything on the disk itself."""
        self._write()
        if self._descriptor is not None:
            self._guarded(lambda: os.fsync(self._open()))

    def close(self) -> None:
        """Says how much is lost where there is still no room."""
        self.flush()
        if self._waiting:
            sys.stderr.write(f"{len(self._waiting)} bytes of {self.path} could not be written\n")
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def open(self) -> None:
        """Prepare and create the file now, where that can be done."""
        self._guarded(self._open)

    def _write(self) -> None:
        if self._waiting:
            self._guarded(self._write_all)

    def _write_all(self) -> None:
        descriptor, done = self._open(), 0
        while done < len(self._waiting):
            done += os.pwrite(descriptor, self._waiting[done:], self._end + done)
        self._end += done
        self._waiting = b""

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._prepare is not None:
                self._prepare(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            self._end = os.fstat(self._descriptor).st_size
        return self._descriptor

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not self._warned:
                why = f"can't write {self.path}: {error.strerror}; what it should hold waits"
                sys.stderr.write(why + "\n")
            self._warned = True


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill has left half written."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
