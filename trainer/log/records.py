"""Files that a run writes its numbers into: JSON lines and TensorBoard events.

A full or failing disk never stops training: lines wait until they fit, TensorBoard is given up,
and one warning says so.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class JsonLines:
    """One JSON object per line, cut back on opening to the lines that `keep` accepts."""

    def __init__(self, path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
        _cut(path, keep)
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._end = os.fstat(self._descriptor).st_size
        self._waiting = b""
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """NaN and infinity become null, which every JSON reader accepts."""
        self._waiting += json.dumps(plain(record), allow_nan=False).encode() + b"\n"
        self._write()

    def flush(self) -> None:
        """Put everything on the disk itself."""
        self._write()
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        self.flush()
        os.close(self._descriptor)

    def _write(self) -> None:
        """Written by offset: what got half through is overwritten by the next try."""
        done = 0
        try:
            while done < len(self._waiting):
                done += os.pwrite(self._descriptor, self._waiting[done:], self._end + done)
        except OSError as error:
            self._warn(error)
            return
        self._end += done
        self._waiting = b""

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warn_once = f"can't write {self._path}: {error.strerror}; its lines wait until it can"
            sys.stderr.write(warn_once + "\n")
        self._warned = True


class TensorBoard:
    """Scalars and images; events of steps from `first_step` on in older files no longer count."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._writer: EventFileWriter | None = EventFileWriter(str(folder))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()])
        self._add(Event(step=step, summary=summary))

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="png")
        height, width, channels = pixels.shape
        image = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=file.getvalue()
        )
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def flush(self) -> None:
        self._guarded(lambda writer: writer.flush())

    def close(self) -> None:
        self._guarded(lambda writer: writer.close())

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._guarded(lambda writer: writer.add_event(event))

    def _guarded(self, action: Callable[[EventFileWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            self._writer = None
            sys.stderr.write(f"TensorBoard events can't be written any more: {error}\n")


def plain(value: Any) -> Any:
    """The value as JSON knows it: numbers out of tensors and arrays, null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str)) or value is None else str(value)


def _cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep whole lines that `keep` accepts, byte for byte; by one rename."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        for line in source:
            if _accepted(line, keep):
                target.write(line)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)


def _accepted(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    """A kill may have left the last line half written."""
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
        return isinstance(record, dict) and keep(record)
    except (ValueError, TypeError, KeyError):  # somebody else's line, or a damaged one
        return False
