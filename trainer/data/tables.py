"""CSV and TSV tables of pictures and captions: what a row of one holds, as members of a sample.

An index finds the rows by their bytes, as it finds the members of a tar; pictures are files that
the rows name. So everything above reads a table as it reads a shard.
"""

from __future__ import annotations

import csv
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from trainer.data.remote import file_size, is_remote, read_file
from trainer.data.tar import Member
from trainer.errors import ConfigError, DataError

ENDINGS = (".csv", ".tsv")
MAX_PICTURE_BYTES = 64 * 2**20
_MARK = b"\xef\xbb\xbf"  # in front of UTF-8 that a spreadsheet wrote


class BadRow(DataError):
    """One row can't be used; the others may be."""


class Columns(NamedTuple):
    """Which columns hold what; `image`, `caption` and `key` where none is asked for."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None


USUAL = Columns()


class Layout(NamedTuple):
    """A table's header, and what is read of it. Kept in the index as the rows' member name."""

    names: Sequence[str]
    image: str
    caption: str | None
    key: str | None
    delimiter: str


def is_table(path: str) -> bool:
    return path.split("?")[0].endswith(ENDINGS)


def scan_table(
    data: bytes, *, path: str, asked: Columns = USUAL
) -> tuple[list[Member], list[str], str]:
    """(rows, their keys, the layout as text) of a whole table.

    A key is what stands in the key column, or else the row's number from 0 in nine digits. A row
    that can't be read ends with its line and is called by its number. DataError for a header
    without the columns, for a key that comes twice and for a table without a row.
    """
    lines = data.splitlines(keepends=True)
    layout, at = _layout(lines, path, asked)
    start = sum(map(len, lines[:at]))
    rows: dict[str, Member] = {}
    while at < len(lines):
        count, values = _extent(lines, at, layout)
        row = b"".join(lines[at : at + count])
        if values != []:
            key = _key(values, len(rows), layout)
            if key in rows:
                raise DataError(
                    f"{path}: the key {key!r} of row {len(rows)} comes a second time; mend it, or "
                    "name another column by --key-column"
                )
            rows[key] = Member(key, 0, start, len(row), zlib.crc32(b""), zlib.crc32(row))
        at, start = at + count, start + len(row)
    if not rows:
        raise DataError(f"{path} has a header and no row")
    return list(rows.values()), list(rows), json.dumps(layout._asdict())


def read_row(row: bytes, layout: str, *, table: str) -> dict[str, bytes]:
    """The sample of one row: its picture by the file's ending, `txt`, and the rest as `json`.

    BadRow where the row is none, or its picture's file can't be read.
    """
    columns = Layout(**json.loads(layout))
    try:
        values, _ = _record(row.splitlines(keepends=True), columns.delimiter)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadRow(f"no row of {len(columns.names)} columns: {error}") from None
    if len(values) != len(columns.names):
        raise BadRow(f"{len(values)} values for {len(columns.names)} columns")
    cells = dict(zip(columns.names, values, strict=True))
    name, caption = cells[columns.image], cells.get(columns.caption or "")
    used = (columns.image, columns.caption, columns.key)
    others = {key: value for key, value in cells.items() if value and key not in used}
    fields = {PurePosixPath(name).suffix[1:].lower() or "image": picture_bytes(name, table)}
    if caption:
        fields["txt"] = caption.encode()
    if others:
        fields["json"] = json.dumps(others, ensure_ascii=False).encode()
    return fields


def _layout(lines: Sequence[bytes], path: str, asked: Columns) -> tuple[Layout, int]:
    """The header, and how many lines it takes."""
    delimiter = "\t" if path.split("?")[0].endswith(".tsv") else ","
    try:
        head = [line.removeprefix(_MARK) if n == 0 else line for n, line in enumerate(lines[:8])]
        names, count = _record(head, delimiter)
    except (csv.Error, UnicodeDecodeError, StopIteration) as error:
        raise DataError(f"{path} does not begin with a line of column names: {error}") from None
    if len(set(names)) < len(names):
        raise DataError(f"{path} has two columns of one name: {', '.join(names)}")
    found = {role: column_of(names, name, role, path) for role, name in asked._asdict().items()}
    return Layout(names, found["image"] or "", found["caption"], found["key"], delimiter), count


def column_of(names: Sequence[str], asked: str | None, role: str, path: str) -> str | None:
    """The column of a role, by its asked or usual name; only the picture has to have one."""
    name = asked or role
    if name in names:
        return name
    if asked or role == "image":
        raise ConfigError(
            f"{path} has no column {name!r}, only {', '.join(names)}; name it by --{role}-column"
        )
    return None


def _extent(lines: Sequence[bytes], at: int, layout: Layout) -> tuple[int, list[str] | None]:
    """How many lines a row takes, and its values; one line and None where it is none.

    Were a quote that never closes not held to its line, it would take the rows behind it along.
    """
    try:
        values, count = _record(map(lines.__getitem__, range(at, len(lines))), layout.delimiter)
    except (csv.Error, UnicodeDecodeError):
        return 1, None
    if values and len(values) != len(layout.names):
        return 1, None
    return count, values


def _record(lines: Iterable[bytes], delimiter: str) -> tuple[list[str], int]:
    """The values of the first row, and how many lines it took."""
    reader = csv.reader((line.decode() for line in lines), delimiter=delimiter, strict=True)
    return next(reader), reader.line_num


def _key(values: list[str] | None, number: int, layout: Layout) -> str:
    if layout.key is None:
        return f"{number:09d}"
    key = values[layout.names.index(layout.key)] if values else ""
    return key if key and "\0" not in key else f"row-{number:09d}"


def picture_bytes(name: str, table: str) -> bytes:
    """A file's bytes, by its path from the table's folder."""
    folder = table.split("?")[0].rpartition("/")[0]
    place = name if is_remote(name) or not folder else os.path.join(folder, name)
    try:
        if not name or not (is_remote(place) or os.path.isfile(place)):
            raise FileNotFoundError(place)
        if (size := file_size(place)) > MAX_PICTURE_BYTES:
            raise BadRow(f"its picture {name!r} has {size} bytes, at most {MAX_PICTURE_BYTES} go")
        return read_file(place)
    except FileNotFoundError:
        raise BadRow(f"there is no picture {name!r}") from None
    except OSError as error:
        raise BadRow(f"its picture {name!r} can't be read: {error.strerror}") from None
