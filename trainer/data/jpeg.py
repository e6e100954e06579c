"""JPEG bytes without the segments that say nothing of the picture, and not more work than a
picture can need.

Notes, profiles and previews are left out, however many there are. What stands in front of the
first scan is walked here, in as many steps as there are segments; the decoder, which walks it byte
by byte, then finds nothing to wonder about.
"""

from __future__ import annotations

import re

MAX_SEGMENTS = 4096
"""In front of the picture; a colour profile, the most cut up of all, has 255."""
MAX_SCANS = 100
"""Each is a pass over the whole picture; encoders write ten."""

_START = b"\xff\xd8\xff"
_MARKER = re.compile(rb"[^\xff]{0,65536}\xff{1,65536}([^\xff])", re.DOTALL)
"""The next marker, behind what decoders skip in front of it: padding and junk."""
_NO_MARKER = 0x00
_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})
"""Markers that no length follows."""
_SCAN = 0xDA
_IGNORED = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
"""Application segments but JFIF's and Adobe's, which tell how colours are stored; comments."""


def plain_jpeg(data: bytes) -> bytes:
    """The same pixels; `data` itself where it is no JPEG.

    ValueError for more than MAX_SEGMENTS segments or MAX_SCANS scans, and for junk without end.
    What can't be followed otherwise is left as it is, for the decoder to complain about.
    """
    if not data.startswith(_START):
        return data
    parts, place = [data[:2]], 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.match(data, place)
        if found is None and len(data) - place > 65_536:
            raise ValueError("more than 65536 bytes of a JPEG belong to no segment")
        if found is None:
            break
        marker, place = found[1][0], found.end() - 2
        if marker == _NO_MARKER:
            place = found.end()
            continue
        end = _end(data, place, marker)
        if end is None:
            break
        if marker not in _IGNORED:
            parts.append(data[place:end])
        place = end
    else:
        raise ValueError(f"a JPEG of more than {MAX_SEGMENTS} segments")
    plain = b"".join([*parts, data[place:]])
    if (scans := plain.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, over {MAX_SCANS}")
    return plain


def _end(data: bytes, place: int, marker: int) -> int | None:
    """Where the segment ends; None where the picture begins, or nothing can be followed."""
    if marker in _ALONE:
        return place + 2
    if marker == _SCAN or marker < 0xC0 or place + 4 > len(data):
        return None
    length = int.from_bytes(data[place + 2 : place + 4], "big")
    if length < 2:
        raise ValueError(f"a JPEG segment of {length} bytes, which has to be 2 at least")
    return place + 2 + length if place + 2 + length <= len(data) else None
