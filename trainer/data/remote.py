"""Files by path or URL: lists of shards, sizes and byte ranges, with bounded retries.

Local paths use the operating system; everything with `://` goes through fsspec (s3, gs, https).
"""

from __future__ import annotations

import glob
import os
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from braceexpand import braceexpand
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem

from trainer.addresses import lacks_secrets
from trainer.data.tar import Bytes
from trainer.errors import DataError
from trainer.hashing import key_of, uniform_of
from trainer.settings.section import split_set

T = TypeVar("T")

ATTEMPTS = 8
FIRST_DELAY_SECONDS = 0.05
REQUEST_TIMEOUT_SECONDS = 60.0
_FINAL = (PermissionError, IsADirectoryError, NotImplementedError)
_BUSY = (408, 425, 429)
_BESIDE = (".index", ".json", ".catalogue")


def is_remote(path: str) -> bool:
    return "://" in path


def expand_shards(spec: str) -> list[str]:
    """The paths of the shards that a spec names, as `expand_sets` finds them."""
    return [path for _, path in expand_sets(spec)]


def expand_sets(spec: str, *, pipes: bool = False) -> list[tuple[str, str]]:
    """(set, path) of the shards that a spec names: braces (`{000..127}`), globs, lists joined by
    `::`, and the name of a set before a part (`cc3m=path`), '' where there is none.

    Globs are sorted. DataError for a glob without a match and for a shard listed twice. A command
    (`pipe:`) has its braces expanded where `pipes` are wanted, and is refused otherwise.
    """
    parts = [split_set(part.strip()) for part in spec.split("::")]
    listed = [(name, path) for name, part in parts for path in _expand(part, spec)]
    for name, path in parts:
        if name and os.path.exists(f"{name}={path.split('/')[0]}"):
            raise DataError(
                f"{name}={path} could be the set {name} or a folder's name; write ./{name}={path} "
                "for the folder"
            )
    for _, path in listed:
        if path.endswith(".catalogue"):
            raise DataError(
                f"{path} is one part of {spec!r}; a catalogue stands alone and without a name, so "
                "write one of all the sets: python tools/index.py name=SHARDS other=SHARDS "
                "--missing --catalogue FILE"
            )
        if path.startswith("pipe:") and not pipes:
            raise DataError(f"{path!r} needs data.reader: webdataset and data.allow_pipe: true")
    if lacking := next((path for _, path in listed if lacks_secrets(path)), None):
        raise DataError(
            f"{lacking} stands in a file that keeps no passwords and signatures; give the whole "
            "address again, as data.train=URL"
        )
    seen: set[str] = set()
    twice = next((path for _, path in listed if path in seen or seen.add(path)), None)  # type: ignore[func-returns-value]
    if twice is not None:
        raise DataError(f"{spec!r} lists {twice} twice")
    return listed


def _expand(part: str, spec: str) -> list[str]:
    if not part:
        raise DataError(f"the shard list {spec!r} has an empty part")
    try:
        paths = list(braceexpand(part))
    except ValueError as error:
        raise DataError(f"the braces of {part!r} do not pair") from error
    if part.startswith("pipe:"):  # a star is the shell's there
        return paths
    return [match for path in paths for match in _matches(path)]


def _matches(path: str) -> list[str]:
    # A question mark in a URL starts its query; only a star is a glob there.
    magic = "*" in path if is_remote(path) else glob.has_magic(path) and not os.path.exists(path)
    if not magic:
        return [path]
    matches = _retried(lambda: _glob(path), path)
    if not matches:
        raise DataError(f"no shard matches {path!r}")
    _refuse_others(matches, path)
    return sorted(matches)


def _refuse_others(matches: list[str], path: str) -> None:
    """A glob that takes in what lies beside shards would have every reader open it as one."""
    tars = any(match.endswith(".tar") for match in matches)
    others = [
        match
        for match in matches
        if match.endswith(_BESIDE) or (tars and not match.endswith(".tar"))
    ]
    if others:
        raise DataError(
            f"{path!r} matches {len(others)} files that are no shards, as {min(others)}; end the "
            "pattern in .tar"
        )


def _glob(path: str) -> list[str]:
    if not is_remote(path):
        return glob.glob(path)
    system, inner = fsspec.core.url_to_fs(path)
    return [system.unstrip_protocol(match) for match in system.glob(inner)]


def file_size(path: str) -> int:
    """Bytes of a file."""
    if not is_remote(path):
        return os.stat(path).st_size
    size = _retried(lambda: _remote_size(path), path)
    if size is None:
        raise DataError(f"{path}: the server does not say how large it is")
    return int(size)


def _remote_size(path: str) -> int | None:
    system, inner = _remote(path)
    size: int | None = system.info(inner, **_limits(system))["size"]
    return size


def read_file(path: str, *, at_most: int | None = None) -> bytes:
    """The whole file; DataError where it is a server's and says to have more bytes than that."""
    if not is_remote(path):
        return Path(path).read_bytes()
    size = file_size(path)
    if at_most is not None and size > at_most:
        raise DataError(f"{path}: the server says {size} bytes, and it can't have over {at_most}")
    return read_range(path, 0, size)


def read_range(path: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file; DataError where it gives more or fewer every time."""
    return _retried(lambda: _checked_range(path, start, end), path)


def _checked_range(path: str, start: int, end: int) -> bytes:
    system, inner = _remote(path)
    if isinstance(system, HTTPFileSystem):
        data = sync(
            *(system.loop, _http_range, system, inner, start, end),
            timeout=REQUEST_TIMEOUT_SECONDS,
        )
    else:
        data = system.cat_file(inner, start=start, end=end, **_limits(system))
    if len(data) != end - start:
        found = len(data) if len(data) < end - start else "more"
        raise OSError(f"expected {end - start} bytes from byte {start} on, found {found}")
    return cast(bytes, data)


async def _http_range(system: HTTPFileSystem, url: str, start: int, end: int) -> bytes:
    """One byte more than was asked for is enough to know that a server answers something else;
    what it goes on to send is not held."""
    if start == end:
        return b""
    session, options = await system.set_session(), dict(system.kwargs)
    own = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options["headers"] = {**options.get("headers", {}), **own}
    data = bytearray()
    async with session.get(system.encode_url(url), **options) as answer:
        system._raise_not_found_for_status(answer, url)
        while len(data) <= end - start:
            if not (more := await answer.content.read(end - start + 1 - len(data))):
                break
            data += more
    return bytes(data)


def open_for_scan(path: str) -> AbstractContextManager[Bytes]:
    """The file from its first byte on, for one pass."""
    if not is_remote(path):
        return open(path, "rb")
    system, inner = _remote(path)
    return cast(AbstractContextManager[Bytes], system.open(inner, "rb"))


def write_file(path: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    if is_remote(path):
        system, inner = _remote(path)
        system.pipe_file(inner, data)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    Path(temporary).write_bytes(data)
    os.replace(temporary, path)


def _remote(path: str) -> tuple[Any, str]:
    # fsspec keeps one instance per server and its connections.
    system, inner = fsspec.core.url_to_fs(path)
    return system, inner


def _limits(system: Any) -> dict[str, float]:
    return {"timeout": REQUEST_TIMEOUT_SECONDS} if system.async_impl else {}


def _retried(action: Callable[[], T], path: str) -> T:
    """Call `action` up to ATTEMPTS times; waits double and are spread by a hash of the path."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if _is_missing(error):
                raise FileNotFoundError(path) from error
            if isinstance(error, _FINAL) or _refused(error):
                raise DataError(f"{path}: {error!r}") from error
            reason = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(_delay(path, attempt))
    raise DataError(f"{path}: {ATTEMPTS} attempts failed, the last with: {reason!r}") from reason


def _is_missing(error: Exception) -> bool:
    # fsspec calls a file missing as well when the connection broke while it asked.
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or _refused(cause))


def _refused(error: BaseException) -> bool:
    """True for an HTTP status that asking again will not change."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in _BUSY


def _delay(path: str, attempt: int) -> float:
    # Ranks that failed together must not come back together.
    rank = int(os.environ.get("RANK", "0"))
    return (
        FIRST_DELAY_SECONDS * float(1 << attempt) * (0.5 + uniform_of(rank, key_of(path), attempt))
    )
