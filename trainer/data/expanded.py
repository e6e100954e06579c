"""What a compressed stream of a shard holds, as long as that is no bomb."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from io import BufferedReader, RawIOBase
from typing import Any

from trainer.data.tar import Bytes
from trainer.errors import DataError

FREELY_EXPANDED = 64 * 2**20
"""Bytes that any compressed shard may hold."""
MOST_EXPANDED = 100
"""Times as many bytes as it has; captions without images come to ten."""
_EXPANDED: dict[bytes, Callable[[Any], Bytes]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


def expanded(stream: Bytes) -> Bytes:
    """The stream expanded, or as it is where it is not compressed.

    Reading raises DataError where it holds over MOST_EXPANDED times as many bytes as it has, and
    more than FREELY_EXPANDED.
    """
    raw = _Raw(stream)
    buffered = BufferedReader(raw)
    first = buffered.peek(6)
    for magic, expand in _EXPANDED.items():
        if first.startswith(magic):
            return _Bounded(expand(buffered), raw)
    return buffered


class _Raw(RawIOBase):
    """Bytes as the io module wants them."""

    def __init__(self, stream: Bytes) -> None:
        self._stream = stream
        self.taken = 0
        """Bytes so far."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:  # each kind of server has errors of its own
            raise OSError(f"{type(error).__name__}: {error}") from error
        buffer[: len(data)] = data
        self.taken += len(data)
        return len(data)


class _Bounded:
    def __init__(self, stream: Bytes, raw: _Raw) -> None:
        self._stream, self._raw, self._given = stream, raw, 0

    def read(self, count: int, /) -> bytes:
        data = self._stream.read(count)
        self._given += len(data)
        if self._given > FREELY_EXPANDED + MOST_EXPANDED * self._raw.taken:
            raise DataError(
                f"its {self._raw.taken} compressed bytes so far hold {self._given}, over "
                f"{MOST_EXPANDED} times as many"
            )
        return data
