"""Files that a run writes its numbers into: JSON lines and TensorBoard events.

A full or failing disk never stops training: what is to be written waits until there is room, and
one warning says so.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from trainer.addresses import all_without_secrets
from trainer.data.waiting_file import WaitingFile


class JsonLines:
    """One JSON object per line, cut back on opening to the lines that `keep` accepts."""

    def __init__(self, path: Path, *, keep: Callable[[dict[str, Any]], bool]) -> None:
        self._file = WaitingFile(path, prepare=lambda path: _cut(path, keep))
        self._file.open()

    def append(self, record: Mapping[str, Any]) -> None:
        """NaN and infinity become null, which every JSON reader accepts."""
        self._file.append(
            json.dumps(all_without_secrets(plain(record)), allow_nan=False).encode() + b"\n"
        )

    def flush(self) -> None:
        """Put everything on the disk itself."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars, images and texts; events of steps from `first_step` on in older files do not count.

    TensorBoard's own writer does not come back from an error, and its records are plain: so they
    are framed by its `RecordWriter` and written as everything else here is.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = WaitingFile(folder / f"{name}.{next(_files)}")
        self._add(Event(file_version="brain.Event:2"))
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

    def text(self, step: int, name: str, markdown: str) -> None:
        self._add(Event(step=step, summary=text_pb(name, markdown)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._file.append(framed.getvalue())


_files = itertools.count()
"""Two files of one process must not have one name."""


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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines; damaged lines are left out."""
    with path.open("rb") as file:
        for line in file:
            record = _record(line)
            if record is not None:
                yield record


def _cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep whole lines that `keep` accepts, byte for byte.

    Lines to go stand at the end of the file as a rule, and cutting that off needs no room; else
    the rest is copied and renamed.
    """
    if not path.exists():
        return
    with path.open("rb") as source:
        kept = sum(len(line) for line in takewhile(lambda line: _accepted(line, keep), source))
        source.seek(kept)
        if not any(_accepted(line, keep) for line in source):
            os.truncate(path, kept)
            return
    temporary = path.with_suffix(".tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        target.writelines(line for line in source if _accepted(line, keep))
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary, path)


def _accepted(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    record = _record(line)
    try:
        return record is not None and keep(record)
    except (TypeError, KeyError):  # somebody else's line
        return False


def _record(line: bytes) -> dict[str, Any] | None:
    """None for a damaged line; a kill may have left the last one half written."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
