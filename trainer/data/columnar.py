"""Parquet and Arrow files of pictures and captions, as Hugging Face datasets keep them, by rows.

An index finds a sample by its row's number and a checksum of its cells; everything above reads such
a file as it reads a shard. Arrow files are mapped into memory; of Parquet a whole group of rows is
decoded at once, and the newest ones are kept.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from trainer.data.remote import file_size, is_remote, read_range
from trainer.data.tables import USUAL, BadRow, Columns, column_of, picture_bytes
from trainer.data.tar import Member
from trainer.errors import ConfigError, DataError

COLUMNAR = (".parquet", ".arrow")
KEPT_BYTES = 256 * 2**20
"""Decoded groups of rows that one process keeps, by their bytes; the newest is always kept."""
OPEN_FILES = 64
_STARTS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}

Cells = Mapping[str, Any]
Near = Callable[[], int]
"""Gives a descriptor."""


class Layout(NamedTuple):
    """What is read of a file. Kept in the index as the rows' member name."""

    image: str
    caption: str | None
    key: str | None


def is_columnar(path: str) -> bool:
    return path.split("?")[0].endswith(COLUMNAR)


def scan_columnar(path: str, *, asked: Columns = USUAL) -> tuple[list[Member], list[str], str]:
    """(rows, their keys, the layout as text) of a whole file.

    A key is what stands in the key column, or else the row's number from 0 in nine digits.
    DataError for a file that can't be read, without rows, and for a key that comes twice.
    """
    try:
        groups = _open(path)
        names = groups.names
        found = {role: column_of(names, name, role, path) for role, name in asked._asdict().items()}
        layout = Layout(found["image"] or "", found["caption"], found["key"])
        rows: dict[str, Member] = {}
        for number, cells in enumerate(_rows(groups)):
            key = _key(cells, number, layout)
            if key in rows:
                raise DataError(
                    f"{path}: the key {key!r} of row {number} comes a second time; mend it, or "
                    "name another column by --key-column"
                )
            rows[key] = Member(key, 0, number, 1, zlib.crc32(b""), _checksum(cells))
    except (OSError, ValueError) as error:  # what pyarrow raises
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path} can't be read: {_first_line(error)}") from None
    if not rows:
        raise DataError(f"{path} has columns and no row")
    return list(rows.values()), list(rows), json.dumps(layout._asdict())


class ColumnarFiles:
    """Rows of many files; open files and decoded groups are kept, the oldest are let go."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _Groups] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def read(
        self, path: str, row: int, *, crc: int, layout: str, near: Near | None = None
    ) -> dict[str, bytes]:
        """The sample of one row: its picture by the file's ending, `txt`, and the rest as `json`.

        `near` opens the same bytes on this machine, where the file is a server's and is kept here.
        BadRow where the row differs from the indexed one, or its picture can't be read.
        """
        try:
            groups = self._file(path, near)
            number, within = groups.place(row)
            cells = self._group(path, number).slice(within, 1).to_pylist()[0]
        except (OSError, ValueError, IndexError) as error:  # what pyarrow raises
            raise BadRow(f"row {row} can't be read: {_first_line(error)}") from None
        if (found := _checksum(cells)) != crc:
            raise BadRow(f"row {row} is damaged, crc32 expected {crc:08x}, found {found:08x}")
        return _fields(cells, Layout(**json.loads(layout)), path)

    def _file(self, path: str, near: Near | None) -> _Groups:
        if path not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)
            self._files[path] = _open(path) if near is None else _open_near(path, near())
        self._files.move_to_end(path)
        return self._files[path]

    def _group(self, path: str, number: int) -> Any:
        name = (path, number)
        if name not in self._groups:
            self._groups[name] = self._files[path].group(number)
            while len(self._groups) > 1 and self._bytes() > KEPT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(name)
        return self._groups[name]

    def _bytes(self) -> int:
        return sum(group.nbytes for group in self._groups.values())


class _Groups:
    """A file as groups of rows that are read at once."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self.names, self.sizes = names, sizes

    def place(self, row: int) -> tuple[int, int]:
        """(group, row within it)."""
        for number, size in enumerate(self.sizes):
            if row < size:
                return number, row
            row -= size
        raise IndexError(f"no row {row} behind the last")

    def group(self, number: int) -> Any:
        raise NotImplementedError


class _Parquet(_Groups):
    def __init__(self, path: str) -> None:
        parquet = needed("pyarrow.parquet", "pyarrow")
        self._file = parquet.ParquetFile(_Ranges(path) if is_remote(path) else path)
        meta = self._file.metadata
        sizes = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]
        super().__init__(self._file.schema_arrow.names, sizes)

    def group(self, number: int) -> Any:
        return self._file.read_row_group(number, use_threads=False)


class _Ranges(io.RawIOBase):
    """A remote file that is read by ranges, each asked for again where the network fails."""

    def __init__(self, path: str) -> None:
        self._path, self._size, self._at = path, file_size(path), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        before = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = before + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        data = read_range(self._path, self._at, end) if end > self._at else b""
        self._at += len(data)
        return data


class _Arrow(_Groups):
    """The stream or file format; nothing is copied until a row is asked for."""

    def __init__(self, path: str) -> None:
        if is_remote(path):
            raise DataError(
                f"{path} is Arrow, which has to lie on a disk; copy it there, or set "
                "data.shard_cache"
            )
        arrow = needed("pyarrow", "pyarrow")
        mapped = arrow.memory_map(path)
        stored = importlib.import_module("pyarrow.ipc")
        try:
            table = stored.open_stream(mapped).read_all()
        except arrow.ArrowInvalid:
            table = stored.open_file(mapped).read_all()
        self._batches = table.to_batches()
        super().__init__(table.column_names, [batch.num_rows for batch in self._batches])

    def group(self, number: int) -> Any:
        return self._batches[number]


def needed(module: str, package: str) -> Any:
    """A module of a package that is not among the requirements; ConfigError without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"this needs a package: pip install {package} ({error})") from error


def _open(path: str) -> _Groups:
    if not is_remote(path):
        file_size(path)  # FileNotFoundError
    return _Parquet(path) if path.split("?")[0].endswith(".parquet") else _Arrow(path)


def _open_near(path: str, descriptor: int) -> _Groups:
    """As `_open`, of an open file that holds the same bytes; its descriptor is closed."""
    kind = _Parquet if path.split("?")[0].endswith(".parquet") else _Arrow
    try:
        return kind(f"/dev/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _rows(groups: _Groups) -> Iterator[Cells]:
    for number, size in enumerate(groups.sizes):
        group = groups.group(number)
        for row in range(size):
            yield group.slice(row, 1).to_pylist()[0]


def _key(cells: Cells, number: int, layout: Layout) -> str:
    if layout.key is None:
        return f"{number:09d}"
    value = cells[layout.key]
    key = "" if value is None else str(value)
    return key if key and "\0" not in key else f"row-{number:09d}"


def _checksum(value: Any, crc: int = 0) -> int:
    """Of all cells by name: bytes as they are, everything else as it is written."""
    if isinstance(value, bytes):
        return zlib.crc32(value, zlib.crc32(b"%d:" % len(value), crc))
    if isinstance(value, Mapping):
        for name in sorted(value):
            crc = _checksum(value[name], zlib.crc32(repr(name).encode(), crc))
        return crc
    return zlib.crc32(repr(value).encode(errors="surrogatepass"), crc)


def _fields(cells: Cells, layout: Layout, path: str) -> dict[str, bytes]:
    name, data = _picture(cells[layout.image], path)
    ending = PurePosixPath(name).suffix[1:].lower() or _ending(data)
    fields = {ending: data}
    if caption := _caption(cells.get(layout.caption or "")):
        fields["txt"] = caption.encode()
    others = {key: value for key, value in cells.items() if key not in layout and _is_told(value)}
    if others:
        fields["json"] = json.dumps(others, ensure_ascii=False).encode()
    return fields


def _picture(value: Any, path: str) -> tuple[str, bytes]:
    """(name, bytes); a cell holds bytes, a path from the file's folder, or both by name."""
    name, data = "", value
    if isinstance(value, Mapping):
        name, data = value.get("path") or "", value.get("bytes")
        data = name if data is None else data
    if isinstance(data, bytes):
        return name, data
    return str(data or ""), picture_bytes(str(data or ""), path)


def _ending(data: bytes) -> str:
    return next((ending for start, ending in _STARTS.items() if data.startswith(start)), "image")


def _caption(value: Any) -> str:
    """One text, or several as lines."""
    if isinstance(value, list):
        return "\n".join(" ".join(str(text).split()) for text in value if text is not None)
    return "" if value is None else str(value)


def _is_told(value: Any) -> bool:
    """Whether a cell can stand in a json: dates, bytes and numbers that are none can't."""
    if value is None or value == "":
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
