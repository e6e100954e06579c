"""A strict reader of tar archives: every byte is accounted for, and nothing is ever extracted.

Plain files are read; directories, links, devices and pipes, which hold no bytes, are skipped, and
everything else (sparse files, absolute names, `..`) is refused by name. POSIX.1-1988 ustar,
PAX paths and sizes, GNU long names.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from trainer.errors import DataError

BLOCK = 512
_EXTENSION_BYTES = 64 * 1024  # no file name or PAX record needs more
_EXTENSIONS = 16  # headers in front of one file's own
_ZEROS_BEHIND = 64 * 2**20  # bytes behind the end; writers fill a block of ten kilobytes
_RECORD = re.compile(rb"(\d{1,6}) ([^=]{1,4096})=")
_PLAIN, _DIRECTORY, _PAX, _PAX_GLOBAL, _LONG_NAME = b"\x000" + b"7", b"5", b"x", b"g", b"L"
_LONG_LINK = b"K"
_SKIPPED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    _DIRECTORY: "a directory",
    b"6": "a pipe",
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}


@runtime_checkable
class Bytes(Protocol):
    """A file to be read from its first byte on."""

    def read(self, count: int, /) -> bytes: ...


class Member(NamedTuple):
    """One plain file of an archive."""

    name: str
    header_bytes: int
    """Bytes of headers in front of the data, extension headers included."""
    offset: int
    """First byte of the data."""
    size: int
    header_crc: int
    crc: int
    """CRC-32 of the data."""


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def scan_tar(
    file: Bytes, *, shard: str, max_member_bytes: int, skipped: list[str] | None = None
) -> Iterator[Member]:
    """Read an archive from its first byte to its last and yield its plain files.

    The names of links, devices and pipes, which hold no bytes of their own, are put into `skipped`.

    A DataError names the shard, the byte and the member: a header whose checksum is wrong, a cut,
    bytes behind the end, a member larger than `max_member_bytes`, a kind or name not allowed.
    """
    scan = _Scan(file, shard, max_member_bytes, [] if skipped is None else skipped)
    return (member for member, _ in scan.files())


def read_tar(file: Bytes, *, shard: str, max_member_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every plain file, in order, as strictly as `scan_tar` looks at them."""
    scan = _Scan(file, shard, max_member_bytes, [])
    return ((member.name, data) for member, data in scan.files())


class _Scan:
    def __init__(self, file: Bytes, shard: str, max_member_bytes: int, skipped: list[str]) -> None:
        self.file, self.shard, self.max_member_bytes = file, shard, max_member_bytes
        self.skipped = skipped
        self.position = 0
        self.place = "the first header"

    def fail(self, problem: str) -> NoReturn:
        raise DataError(f"{self.shard}: {problem}")

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if self.position == 0:
            self.refuse_compression(data)
        if len(data) < count:
            self.fail(
                f"truncated: {self.place} needs bytes up to {self.position + count}, "
                f"found {self.position + len(data)}; copy or download the shard again"
            )
        self.position += count
        return data

    def files(self) -> Iterator[tuple[Member, bytes]]:
        while True:
            headers: list[bytes] = []
            header = self.header(headers)
            if header is None:
                return self.rest_is_zero()
            name = self.name_of(header)
            if header.kind in _SKIPPED:
                self.skipped += [] if header.kind == _DIRECTORY else [name]
                continue
            offset = self.position
            data = self.data(header.size)
            member = Member(
                name=name,
                header_bytes=sum(map(len, headers)),
                offset=offset,
                size=header.size,
                header_crc=zlib.crc32(b"".join(headers)),
                crc=zlib.crc32(data),
            )
            yield member, data
            self.place = f"the header after {name!r}"

    def header(self, blocks: list[bytes]) -> _Header | None:
        """The next member's header with its extensions applied; None at the end."""
        long_name: bytes | None = None
        long_size: int | None = None
        while True:
            block = self.take(BLOCK)
            if not any(block):
                return None if not blocks else self.fail("ends between a header and its file")
            blocks.append(block)
            if len(blocks) > 2 * _EXTENSIONS:
                self.fail(f"more than {_EXTENSIONS} extension headers before byte {self.position}")
            header = self.parse(block)
            if header.kind == _LONG_NAME:
                long_name = self.extension(header, blocks).rstrip(b"\0")
            elif header.kind == _LONG_LINK:
                self.extension(header, blocks)
            elif header.kind in (_PAX, _PAX_GLOBAL):
                records = self.pax(self.extension(header, blocks), header.kind)
                long_name = records.get(b"path", long_name)
                long_size = self.pax_size(records) if b"size" in records else long_size
            else:
                size = header.size if long_size is None else long_size
                return self.checked(_Header(long_name or header.name, size, header.kind))

    def parse(self, block: bytes) -> _Header:
        start = self.position - BLOCK
        found = sum(block) - sum(block[148:156]) + 8 * ord(" ")
        expected = _octal(block[148:156])
        if expected != found:
            self.fail(
                f"damaged: the tar header at byte {start} says checksum {expected}, found {found}"
            )
        size = _number(block[124:136])
        if size is None:
            self.fail(f"damaged: the tar header at byte {start} has no readable size")
        name = block[:100].split(b"\0")[0]
        prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
        return _Header(prefix + b"/" + name if prefix else name, size, block[156:157])

    def refuse_compression(self, first: bytes) -> None:
        for magic, method in _COMPRESSED.items():
            if first.startswith(magic):
                self.fail(f"is {method}-compressed; shards are plain tars, decompress it first")

    def extension(self, header: _Header, blocks: list[bytes]) -> bytes:
        if header.size > _EXTENSION_BYTES:
            self.fail(f"an extension header of {header.size} bytes, over {_EXTENSION_BYTES}")
        blocks.append(self.take(_padded(header.size)))
        return blocks[-1][: header.size]

    def pax(self, data: bytes, kind: bytes) -> dict[bytes, bytes]:
        records: dict[bytes, bytes] = {}
        place = 0
        while place < len(data):
            match = _RECORD.match(data, place)
            end = place + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(data) or data[end - 1] != 10:
                self.fail(f"damaged: the PAX header before byte {self.position} can't be parsed")
            records[match[2]] = data[match.end() : end - 1]
            place = end
        if any(key.startswith(b"GNU.sparse") for key in records):
            self.fail("holds a sparse file; write it as a plain one")
        if kind == _PAX_GLOBAL and {b"path", b"size"} & records.keys():
            self.fail("a global PAX header sets the path or size of every member")
        return records

    def pax_size(self, records: dict[bytes, bytes]) -> int:
        text = records[b"size"]
        return int(text) if re.fullmatch(rb"\d{1,15}", text) else self.fail(f"PAX size {text!r}")

    def checked(self, header: _Header) -> _Header:
        shown = repr(header.name.decode(errors="replace"))
        if header.kind not in (*_SKIPPED, *(bytes([kind]) for kind in _PLAIN)):
            kind = "a sparse file" if header.kind == b"S" else f"of tar type {header.kind!r}"
            self.fail(f"{shown} is {kind}; only plain files are read")
        if header.name.startswith(b"/") or b".." in header.name.split(b"/"):
            self.fail(f"{shown} points outside of the archive")
        if header.size and header.kind in _SKIPPED:
            kind = _SKIPPED[header.kind]
            self.fail(f"{shown} is {kind}, yet has {header.size} bytes of data")
        if header.size > self.max_member_bytes:
            self.fail(f"{shown} has {header.size} bytes, over the cap of {self.max_member_bytes}")
        self.place = f"member {shown}"
        return header

    def name_of(self, header: _Header) -> str:
        try:
            name = header.name.decode()
        except UnicodeDecodeError:
            self.fail(f"the name {header.name!r} is not UTF-8")
        return name if "\0" not in name else self.fail(f"the name {name!r} holds a NUL")

    def data(self, size: int) -> bytes:
        return self.take(_padded(size))[:size]

    def rest_is_zero(self) -> None:
        """An archive glued behind another would otherwise be lost in silence."""
        zeros = 0
        while block := self.file.read(1 << 20):
            if any(block):
                self.fail(f"has data behind its end-of-archive block at byte {self.position}")
            if (zeros := zeros + len(block)) > _ZEROS_BEHIND:
                self.fail(f"has over {_ZEROS_BEHIND} zeros behind its end at byte {self.position}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's base-256 one of at most 7 bytes."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big") if not any(field[1:5]) else None
    return _octal(field)
