"""Files made to cost time or memory: refused by what their first bytes say, counted, never silent.

No test here measures time. A bomb that is read as it wants to be takes minutes or gigabytes; what
is held while it is refused is measured.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.bad_server import serve
from tests.data.streams import open_stream, write_shards
from tests.data.tars import make_samples, write_members, write_tar
from trainer.config import DataConfig
from trainer.data import index, remote
from trainer.data.captions import choose_caption
from trainer.data.decode import BadSample, decode_image
from trainer.data.expanded import expanded
from trainer.data.index import read_index, write_index
from trainer.data.shards import ShardSet
from trainer.data.tar import read_tar, scan_tar
from trainer.errors import DataError

HELD = 5 * 2**20


def chunk(tag: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def png(width: int, height: int, *, before: bytes = b"", behind: bytes = b"") -> bytes:
    """Gray of one bit a pixel, all black."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 1)
    parts = [chunk(b"IHDR", head), before, chunk(b"IDAT", rows), behind, chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(*, before: bytes = b"", scans: int = 0, side: int = 64) -> bytes:
    """A progressive one; `before` stands behind its first marker, its last scan comes again."""
    data = saved(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:2] + before + data[2:-2] + last * scans + data[-2:]


def webp(width: int, height: int) -> bytes:
    """A film of one frame of four pixels, on a canvas that is said to be larger."""
    frame = saved(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    corner, size = bytes(6), b"\1\0\0\1\0\0"
    frame = corner + size + b"\x0a\0\0\0" + frame
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + sides
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame))
    return b"RIFF" + struct.pack("<I", len(body + frame)) + body + frame


def gif(frames: int) -> bytes:
    frame = b"\x21\xf9\4\0\0\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    return b"GIF89a\1\0\1\0\0\0\0" + frame * frames + b";"


def film(frames: int) -> bytes:
    """An animated PNG."""
    one = chunk(b"fcTL", bytes(26)) + chunk(b"fdAT", bytes(4) + zlib.compress(bytes(16)))
    return png(8, 8, before=chunk(b"acTL", struct.pack(">II", frames, 0)), behind=one * frames)


BOMBS: dict[str, Callable[[], bytes]] = {
    "64 million pixels of one bit": lambda: png(8000, 8000),
    "a canvas of 256 million pixels": lambda: webp(16_000, 16_000),
    "a GIF of a hundred thousand frames": lambda: gif(100_000),
    "a PNG of a hundred thousand frames": lambda: film(100_000),
    "a million private chunks": lambda: png(8, 8, before=chunk(b"prVt") * 1_000_000),
    "a million notes behind the picture": lambda: png(8, 8, behind=chunk(b"tEXt") * 1_000_000),
    "a million empty parts of the picture": lambda: png(8, 8, before=chunk(b"IDAT") * 1_000_000),
    "a million notes in a JPEG": lambda: jpeg(before=b"\xff\xe1\0\2" * 1_000_000),
    "a million comments in a JPEG": lambda: jpeg(before=b"\xff\xfe\0\2" * 1_000_000),
    "segments of no length": lambda: jpeg(before=b"\xff\xe1\0\0" * 1_000_000),
    "padding without end": lambda: jpeg(before=b"\xff" * 4_000_000),
    "junk without end": lambda: jpeg(before=b"\xff\xe1\0\2" + b"\xff\0" * 2_000_000),
    "a thousand passes over a picture": lambda: jpeg(scans=1000, side=5000),
    "no pixels": lambda: png(0, 0),
    "a page of a website": lambda: b"<!DOCTYPE html><html>" + b"<p>not found" * 100_000,
    "a compressed file": lambda: gzip.compress(bytes(50_000_000), 1),
}


@pytest.mark.heavy
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_picture_is_refused_before_it_costs_anything(bomb: Callable[[], bytes]) -> None:
    data = bomb()
    tracemalloc.start()
    try:
        with pytest.raises(BadSample):
            decode_image(data, size=8, background=(0, 0, 0), max_pixels=25_000_000)
        assert tracemalloc.get_traced_memory()[1] < HELD
    finally:
        tracemalloc.stop()


def test_large_notes_are_not_even_copied_and_the_picture_is_read() -> None:
    plain = jpeg()
    profile = b"ICC_PROFILE\0" + bytes([1, 255])
    big = b"".join(b"\xff\xe2\xff\xff" + profile + bytes(65_519) for _ in range(255))
    for noted, same in (
        (jpeg(before=big), plain),
        (jpeg(before=b"\xff\xe1\xff\xff" + b"Exif\0\0MM\0*" + b"\xff" * 65_523), plain),
        (png(64, 64, before=chunk(b"iTXt", bytes(16_000_000))), png(64, 64)),
        (png(64, 64, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7)))), png(64, 64)),
    ):
        tracemalloc.start()
        found = decode_image(noted, size=8, background=(0, 0, 0), max_pixels=25_000_000)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert held < HELD
        assert found.equal(decode_image(same, size=8, background=(0, 0, 0), max_pixels=25_000_000))


TEXTS = {
    "lists in a json": ("json", b'{"name": "a", "x": [' + b"[]," * 700_000 + b"0]}"),
    "objects in a json": ("json", b'{"name": "a", "x": [' + b"{}," * 700_000 + b"0]}"),
    "lists in lists": ("json", b'{"name": ' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "a text of lines": ("txt", b"a\n" * 2_000_000),
}


@pytest.mark.parametrize(("member", "data"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_becomes_much_more_than_it_is_is_refused(member: str, data: bytes) -> None:
    field = "name" if member == "json" else "txt"
    captions = DataConfig(train="x.tar", captions={"fields": [field]}).captions
    tracemalloc.start()
    try:
        with pytest.raises(BadSample):
            choose_caption({member: data}, sample_id=1, epoch=0, seed=0, config=captions)
        assert tracemalloc.get_traced_memory()[1] < HELD
    finally:
        tracemalloc.stop()


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, b"%011o\0" % size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


class Endless:
    """A file of one start and one block that comes again and again, up to a terabyte."""

    def __init__(self, start: bytes, again: bytes) -> None:
        self.start, self.again, self.given = start, again, 0

    def read(self, count: int) -> bytes:
        assert self.given < 2**30, "read on and on"
        self.given += count
        if self.start:
            part, self.start = self.start[:count], self.start[count:]
            return part + self.again[: count - len(part)] if len(part) < count else part
        return (self.again * (count // len(self.again) + 1))[:count]


PAX = header(b"pax", 512, b"x") + (b"512 comment=" + b"a" * 499 + b"\n")
WIDE = header(b"pax", 65_536, b"x") + b"6 a=b\n" * 10_922 + b"4 =\n"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (Endless(PAX * 20, PAX), "more than 16 extension headers"),
        (Endless(WIDE, WIDE), "more than 16 extension headers|can't be parsed"),
        (Endless(header(b"a" * 100, 5, b"L") * 40, bytes(512)), "checksum|extension headers"),
        (Endless(header(b"k.txt", 0) + bytes(1024), bytes(512)), "zeros behind its end"),
        (Endless(header(b"k.txt", 2**33 - 1), b"a"), "over the cap"),
    ],
    ids=["notes", "small notes", "names", "zeros", "a member"],
)
def test_an_archive_without_end_is_refused(file: Endless, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            list(scan_tar(file, shard="s.tar", max_member_bytes=2**26))
        assert tracemalloc.get_traced_memory()[1] < HELD
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_archive_that_swells_is_read_no_further(
    pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams alone are expanded; here one mebibyte may swell, for which there are 64."""
    monkeypatch.setattr("trainer.data.expanded.FREELY_EXPANDED", 2**20)
    members = b"".join(header(b"%d.txt" % n, 2**18) + bytes(2**18) for n in range(20))
    stream = expanded(io.BytesIO(pack(members)))
    files = read_tar(stream, shard="s.tar", max_member_bytes=2**26)
    assert len(list(itertools.islice(files, 3))) == 3
    with pytest.raises(DataError, match="over 100 times as many"):
        list(files)


def test_members_of_more_kinds_than_an_index_can_number_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = np.dtype(dict(index._MEMBER_COLUMNS)["suffix"])
    assert np.iinfo(kind).max + 1 == index._MOST_SUFFIXES
    monkeypatch.setattr(index, "_MOST_SUFFIXES", 8)
    write_index(write_members(tmp_path / "8.tar", [(f"k.{number}", b"") for number in range(8)]))
    path = write_members(tmp_path / "9.tar", [(f"k.{number}", b"") for number in range(9)])
    with pytest.raises(DataError, match="9 members are named differently"):
        write_index(path)


def test_a_sample_of_many_large_members_is_one_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [("a.txt", b"small"), *[(f"k.{n}", bytes(4096)) for n in range(9)]]
    path = write_members(tmp_path / "a.tar", members)
    write_index(path)
    monkeypatch.setattr("trainer.data.members.MAX_SAMPLE_BYTES", 8 * 4096)
    shards = ShardSet.open(path)
    assert shards.read(0).fields == {"txt": b"small"}
    with pytest.raises(DataError, match="members of k span"):
        shards.read(1)


def test_bombs_of_a_shard_are_lines_of_the_ledger_and_count(tmp_path: Path) -> None:
    local = write_shards(tmp_path, [40])
    bad = {
        "bomb": {"png": png(8000, 8000), "txt": b"large"},
        "page": {"jpg": b"<html>", "txt": b"a page"},
        "deep": {"png": png(8, 8), "txt": b"a" * 2**21},
    }
    write_index(write_tar(tmp_path / "bad.tar", bad))
    stream = open_stream(
        f"{local}::{tmp_path / 'bad.tar'}", global_batch=43, workdir=tmp_path, bad_sample_budget=0.5
    )
    stream.take()
    stream.close()
    lines = (tmp_path / "ledger" / "rank-0.jsonl").read_text().splitlines()
    reasons = {line["key"]: line["reason"] for line in map(json.loads, lines)}
    assert reasons["bomb"].startswith("8000 x 8000 = 64000000 pixels, over 25000000")
    assert reasons["page"].startswith("not a PNG, JPEG, WEBP image")
    assert reasons["deep"].startswith("txt has 2097152 bytes, over 1048576")


def test_an_index_that_points_where_nothing_is_is_refused(tmp_path: Path) -> None:
    """Its sums are right: whoever serves shards may write such an index."""
    path = write_tar(tmp_path / "a.tar", make_samples(5))
    write_index(path)
    file = tmp_path / "a.tar.index"
    good, head, crc = file.read_bytes(), index._HEADER, index._CRC
    fields, payload = list(head.unpack(good[: head.size])), good[index.HEADER_BYTES :]
    forged = []
    for place in (2, 3, 4, 5):  # samples, members, bytes of keys and suffixes
        for value in (0, 1, fields[place] + 1, 2**40, 2**63):
            other = list(fields)
            other[place] = value
            forged.append((other, payload))
    for start in range(40, len(payload) - 8, 8):  # behind the ids
        forged.append((list(fields), payload[:start] + b"\xff" * 8 + payload[start + 8 :]))
    refused = 0
    for other, data in forged:
        other[6] = blake2b(data, digest_size=16).digest()
        packed = head.pack(*other)
        file.write_bytes(packed + crc.pack(zlib.crc32(packed)) + data)
        try:
            read_index(path)
            shards = ShardSet.open(path)
            for row in range(len(shards)):
                shards.read(row)
        except DataError:
            refused += 1
    assert refused > len(forged) - 3  # sums of headers may hold where a whole column is right


LIES = {
    "more than was asked for": "endless",
    "a length that is not true": "long",
    "the whole file instead of a part": "whole",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_server_that_lies_about_lengths(
    tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    with serve(tmp_path, faults=(lie,), share=1.0) as server:
        tracemalloc.start()
        with pytest.raises(DataError, match=r"expected 10 bytes from byte 5 on|ClientPayloadError"):
            remote.read_range(f"{server.url}/a.bin", 5, 15)
        assert tracemalloc.get_traced_memory()[1] < HELD
        tracemalloc.stop()
        if lie == "long":
            with pytest.raises(DataError, match="says 100000 bytes, and it can't have over 999"):
                remote.read_file(f"{server.url}/a.bin", at_most=999)


@pytest.mark.heavy
def test_a_server_that_sends_a_byte_a_second_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT_SECONDS", 0.2)
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    with (
        serve(tmp_path, faults=("slow",), share=1.0) as server,
        pytest.raises(DataError, match="2 attempts failed, the last with: FSTimeoutError"),
    ):
        remote.read_range(f"{server.url}/a.bin", 5, 500)
