"""PNG bytes without the chunks that say nothing of the picture, as Pillow reads them right.

Notes, profiles, dates and further frames may be of any size and may be broken; no pixel depends on
them here. And a transparent colour is stored in the file's own bit depth, while Pillow compares it
with 8 bits.
"""

from __future__ import annotations

import struct
import zlib

MAX_CHUNKS = 16_384
"""A decoder takes them one by one; those that encoders write hold 8 KiB and more."""
_MAGIC = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20
"""Of a tag's first letter: a chunk without which the picture can be shown."""
_GRAY, _COLOUR = 0, 2


def plain_png(data: bytes) -> bytes:
    """The same pixels, of the picture that is no frame of a film; `data` itself where it is no PNG.

    ValueError for more than MAX_CHUNKS chunks. What can't be followed as chunks is left as it is,
    for the decoder to complain about.
    """
    if not data.startswith(_MAGIC):
        return data
    depth, kind = data[24:25], data[25:26]
    parts, place = [_MAGIC], len(_MAGIC)
    for _ in range(MAX_CHUNKS):
        if place + 12 > len(data):
            break
        size, tag = struct.unpack_from(">I4s", data, place)
        end = place + 12 + size
        if tag == b"tRNS" and depth and kind:
            parts.append(_in_eight_bits(data[place:end], depth[0], kind[0]))
        elif not tag[0] & _ANCILLARY:
            parts.append(data[place:end])
        place = end
        if tag == b"IEND":
            break
    else:
        raise ValueError(f"a PNG of more than {MAX_CHUNKS} chunks")
    return b"".join(parts)


def _in_eight_bits(chunk: bytes, depth: int, kind: int) -> bytes:
    """The transparent gray or colour as Pillow's pixels have it; 16 bits of gray stay 16 bits.

    Pillow keeps the upper 8 of 16 bits of a colour, so neighbours of it are transparent as well.
    """
    body = chunk[8:-4]
    if kind == _GRAY and len(body) == 2 and depth in (2, 4):
        body = struct.pack(">H", struct.unpack(">H", body)[0] * (255 // (2**depth - 1)))
    elif kind == _COLOUR and len(body) == 6 and depth == 16:
        body = struct.pack(">3H", *(value >> 8 for value in struct.unpack(">3H", body)))
    else:
        return chunk
    head = chunk[4:8] + body
    return chunk[:4] + head + struct.pack(">I", zlib.crc32(head))
