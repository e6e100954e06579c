"""A sample's members out of the bytes of its shard, each compared with its checksum."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

from trainer.data.index import MAX_SAMPLE_BYTES, ShardIndex
from trainer.data.tables import BadRow, is_table, read_row
from trainer.errors import DataError


class DamagedSample(DataError):
    """The bytes of one sample are not those that were indexed; the rest of the shard may be."""


class RawSample(NamedTuple):
    """One sample as it is stored."""

    sample_id: int
    shard: str
    key: str
    fields: dict[str, bytes]
    """Member contents by suffix, without the dot: `png`, `txt`, `json`."""


def read_members(
    columns: ShardIndex,
    row: int,
    shard: str,
    fetch: Callable[[int, int], bytes],
    *,
    only: str | None = None,
) -> RawSample:
    """A sample's members in one request for its bytes, or those alone whose suffix is `only`."""
    members = list(range(int(columns.first[row]), int(columns.first[row + 1])))
    if only is not None:
        members = [m for m in members if columns.suffixes[columns.suffix[m]] == only]
        if not members:
            return RawSample(int(columns.ids[row]), shard, columns.keys[row], {})
    start = int(columns.offset[members[0]]) - int(columns.header_bytes[members[0]])
    end = int(columns.offset[members[-1]]) + int(columns.size[members[-1]])
    if not 0 <= start <= end <= start + MAX_SAMPLE_BYTES:
        raise DamagedSample(
            f"{shard}: the members of {columns.keys[row]} span {end - start} bytes, over "
            f"{MAX_SAMPLE_BYTES}"
        )
    data = fetch(start, end)
    fields: dict[str, bytes] = {}
    for member in members:
        suffix = columns.suffixes[columns.suffix[member]]
        place = f"{shard}: {columns.keys[row]}"
        place += "" if is_table(shard) else f".{suffix}"
        fields[suffix] = checked_member(data, start, columns, member, place)
    if is_table(shard):
        fields = row_fields(fields, shard, place)
    return RawSample(int(columns.ids[row]), shard, columns.keys[row], fields)


def row_fields(stored: dict[str, bytes], table: str, place: str) -> dict[str, bytes]:
    """What a table's row holds. Its one member is the row, and is named by the layout."""
    ((layout, row),) = stored.items()
    try:
        return read_row(row, layout, table=table)
    except BadRow as error:
        raise DamagedSample(f"{place}: {error}") from None


def checked_member(data: bytes, start: int, columns: ShardIndex, member: int, place: str) -> bytes:
    """The member's bytes out of `data`, which begins at byte `start` of the shard."""
    offset = int(columns.offset[member]) - start
    header = data[offset - int(columns.header_bytes[member]) : offset]
    content = data[offset : offset + int(columns.size[member])]
    for what, found, expected in (
        ("tar header", zlib.crc32(header), int(columns.header_crc[member])),
        ("content", zlib.crc32(content), int(columns.crc[member])),
    ):
        if found != expected:
            raise DamagedSample(
                f"{place}: {what} at byte {start + offset} is damaged, crc32 expected "
                f"{expected:08x}, found {found:08x}"
            )
    return content
