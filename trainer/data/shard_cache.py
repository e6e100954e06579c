"""Shards of servers on a disk of this machine, fetched whole, by one process for all.

A sample read by itself is a request of its own; a shard in parts of eight mebibytes is a hundredth
of the requests, and its samples are then read from the disk. The processes of a machine share the
folder: whoever comes first fetches, the others wait. What was not used for longest makes room.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trainer.data.remote import read_range
from trainer.errors import DataError

PART_BYTES = 8 << 20
_LOCKS = 64


class ShardCache(NamedTuple):
    """A folder of this machine, and how much it may hold."""

    folder: Path
    most_bytes: int

    def open(self, url: str, size: int) -> int:
        """A descriptor of the shard's `size` bytes, fetched where they are not here.

        It reads on where the file is removed to make room. DataError where the shard alone is
        larger than the cache, or the server does not give these bytes.
        """
        if size > self.most_bytes:
            raise DataError(
                f"{url} has {size} bytes, more than the {self.most_bytes} of data.shard_cache.gib; "
                "raise it: a window of shards has to fit"
            )
        name = blake2b(f"{size} {url}".encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.tar"
        if (found := _opened(path, size)) is not None:
            return found
        try:
            found = self._fetched(url, size, path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(
                f"can't keep {url} in data.shard_cache.folder {self.folder}: "
                f"{error.strerror or error}"
            ) from error
        if found is None:
            raise DataError(
                f"{url} was removed from {self.folder} before it could be read; raise "
                "data.shard_cache.gib: the shards that are read at one time have to fit"
            )
        return found

    def _fetched(self, url: str, size: int, path: Path) -> int | None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder / f"{int(path.name[:2], 16) % _LOCKS}.lock"):
            if (found := _opened(path, size)) is not None:  # by another process, meanwhile
                return found
            with _alone(self.folder / "room.lock"):
                self._make_room(size)
                part = _begin(path, size)
            _fetch(url, size, part, path)
            return _opened(path, size)

    def _make_room(self, size: int) -> None:
        """Remove the shards that were not opened for longest; parts of ended fetches too."""
        shards, held = [], 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".part" and not _is_locked(path):
                    path.unlink()
                elif path.suffix in (".part", ".tar"):
                    held += status.st_size
                    shards += [(status.st_mtime_ns, status.st_size, path)]
        for _, length, path in sorted(shards):
            if held + size <= self.most_bytes:
                return
            if path.suffix == ".tar":
                path.unlink(missing_ok=True)
                held -= length


def _opened(path: Path, size: int) -> int | None:
    """A descriptor, and the file counts as used now; None where it is not there whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        return None
    with suppress(OSError):
        os.utime(path)
    return descriptor


def _begin(path: Path, size: int) -> BinaryIO:
    """A part of that name, as large as the whole will be, locked while somebody writes it."""
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.part").open("wb")
    fcntl.flock(part, fcntl.LOCK_EX)
    part.truncate(size)
    return part


def _fetch(url: str, size: int, part: BinaryIO, path: Path) -> None:
    """All of it or nothing."""
    try:
        with part:
            for start in range(0, size, PART_BYTES):
                part.write(read_range(url, start, min(start + PART_BYTES, size)))
            part.flush()
            os.replace(part.name, path)
    finally:
        Path(part.name).unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time; whatever ends it lets the next one in."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
