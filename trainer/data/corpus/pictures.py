"""Pictures of the corpus: 72 x 72 PNG with transparency, and the hash of what an eye sees."""

from __future__ import annotations

import hashlib
import io
import re

import resvg_py
from PIL import Image

SIDE = 72
_INK = "#202020"
_HASH_SIDE = 32
_MAX_SVG_BYTES = 1 << 20
_WHITE = (255, 255, 255, 255)


def square_png(data: bytes) -> bytes:
    """The picture as RGBA of 72 x 72 pixels: centred on a transparent square, then resized.

    Bytes that have this form already come back unchanged. ValueError if they are no picture.
    """
    try:
        stored = Image.open(io.BytesIO(data))
        picture = stored.convert("RGBA")
    except OSError as error:
        raise ValueError(f"no readable picture: {error}") from None
    if stored.format == "PNG" and stored.mode == "RGBA" and stored.size == (SIDE, SIDE):
        return data
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    if side != SIDE:
        square = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    output = io.BytesIO()
    square.save(output, "PNG")
    return output.getvalue()


def render_svg(data: bytes) -> bytes:
    """An SVG drawn at 72 x 72; `currentColor` becomes a dark grey. ValueError if it can't be drawn.

    Fonts of the machine are left out, so that every machine draws the same.
    """
    if len(data) > _MAX_SVG_BYTES:
        raise ValueError(f"SVG of {len(data)} bytes")
    text = re.sub("currentcolor", _INK, data.decode("utf-8"), flags=re.IGNORECASE)
    drawn = resvg_py.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE, skip_system_fonts=True)
    return square_png(bytes(drawn))


def pixel_hash(png: bytes) -> str:
    """Equal for pictures that look the same on white at 32 x 32 pixels, whatever their encoding."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", picture.size, _WHITE)
    page.alpha_composite(picture)
    seen = page.convert("RGB").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.BOX)
    return hashlib.blake2b(seen.tobytes(), digest_size=16).hexdigest()
