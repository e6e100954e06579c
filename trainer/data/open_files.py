"""The shards whose files are open, the last ones that were read."""

from __future__ import annotations

import os
from collections import OrderedDict

from trainer.data.opening import wrong_size
from trainer.data.remote import is_remote
from trainer.data.shard_cache import ShardCache
from trainer.errors import DataError

OPEN_SHARDS = 64
"""Files, and parsed indexes, that are kept; a window of shards must fit."""


class OpenFiles:
    """Bytes of local files, and of remote ones that a cache holds."""

    def __init__(self, cache: ShardCache | None) -> None:
        self._cache = cache
        self._handles: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str, start: int, end: int, *, expected: int, samples: int) -> bytes:
        """Bytes [start, end) of a file of `expected` bytes; DataError where it has others."""
        try:
            handle = self._handle(name, expected, samples)
            data = os.pread(handle, end - start, start)
        except OSError as error:
            raise DataError(f"can't read {name}: {error.strerror}") from error
        if len(data) < end - start:
            raise wrong_size(name, expected, os.fstat(handle).st_size)
        return data

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _handle(self, name: str, expected: int, samples: int) -> int:
        if name not in self._handles:
            if len(self._handles) >= OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
            self._handles[name] = self._opened(name, expected, samples)
        self._handles.move_to_end(name)
        return self._handles[name]

    def _opened(self, name: str, expected: int, samples: int) -> int:
        if self._cache is not None and is_remote(name):
            return self._cache.open(name, expected)
        handle = os.open(name, os.O_RDONLY)
        found = os.fstat(handle).st_size
        if found != expected:
            os.close(handle)
            raise wrong_size(name, expected, found, samples)
        return handle
