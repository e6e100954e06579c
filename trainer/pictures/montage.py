"""Pictures of what clusters hold and what a query finds: people would rather look than read.

Images are uint8 arrays [height, width, 3]; texts come from the data and are never trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels = UInt8[np.ndarray, "_ _ 3"]
Sample = tuple[Pixels, str]
"""An image and its caption."""

INK, PALE, LINE = (32, 34, 38), (110, 114, 122), (222, 224, 228)
RIGHT, WRONG = (22, 130, 70), (150, 154, 162)
_GAP = 8
_CAPTION_LINES = 2


class Hit(NamedTuple):
    """One text that a query image found."""

    text: str
    right: bool
    """True if it belongs to the image."""


def cluster_montage(
    groups: Sequence[Sequence[Sample]],
    *,
    titles: Sequence[str],
    columns: int | None = None,
    tile: int = 104,
) -> Pixels:
    """One row per cluster: its title ("cluster 7: 312 samples"), then images over captions.

    At most `columns` images a row (all where None), `tile` pixels each. Captions are cut to two
    lines. ValueError without a group or with another number of titles.
    """
    if not groups or len(titles) != len(groups):
        raise ValueError(f"{len(groups)} groups and {len(titles)} titles")
    columns = columns or max(len(group) for group in groups) or 1
    small, large = _font(12), _font(15)
    header = _line_height(large) + _GAP
    row = header + tile + _CAPTION_LINES * _line_height(small) + 2 * _GAP
    width = max(columns * (tile + _GAP) + _GAP, 240)
    sheet = Image.new("RGB", (width, len(groups) * row + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, group) in enumerate(zip(titles, groups, strict=True)):
        top = _GAP + number * row
        if number:
            draw.line((_GAP, top - _GAP // 2, width - _GAP, top - _GAP // 2), fill=LINE)
        draw.text((_GAP, top), _cut(title, large, width - 2 * _GAP), font=large, fill=INK)
        for column, (image, caption) in enumerate(group[:columns]):
            left = _GAP + column * (tile + _GAP)
            sheet.paste(fitted(image, tile), (left, top + header))
            lines = _wrapped(caption, small, tile, _CAPTION_LINES)
            _write(draw, left, top + header + tile + 2, lines, small)
    return np.array(sheet)


def retrieval_montage(
    queries: Sequence[tuple[Pixels, Sequence[Hit]]], *, tile: int = 104, text_width: int = 440
) -> Pixels:
    """One row per query: the image, then the texts it found, best first; right ones are green.

    ValueError without a query.
    """
    if not queries:
        raise ValueError("no query to show")
    font = _font(13)
    step = _line_height(font) + 4
    heights = [max(tile, step * len(hits)) + 2 * _GAP for _, hits in queries]
    sheet = Image.new("RGB", (tile + text_width + 3 * _GAP, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (image, hits), height in zip(queries, heights, strict=True):
        if top:
            draw.line((_GAP, top, sheet.width - _GAP, top), fill=LINE)
        sheet.paste(fitted(image, tile), (_GAP, top + _GAP))
        left = tile + 2 * _GAP
        for rank, hit in enumerate(hits):
            place = top + _GAP + rank * step
            _mark(draw, left, place + step // 2 - 2, right=hit.right)
            text = _cut(f"{rank + 1}. {hit.text}", font, text_width - 24)
            draw.text((left + 20, place), text, font=font, fill=RIGHT if hit.right else INK)
        top += height
    return np.array(sheet)


def fitted(image: Pixels, tile: int) -> Image.Image:
    """The image scaled into a white square of `tile` pixels, its shape kept."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    factor = tile / max(picture.size)
    size = [max(round(side * factor), 1) for side in picture.size]
    scaled = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (tile, tile), "white")
    square.paste(scaled, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return square


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows accents, Greek and Cyrillic."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.getbbox("Ag|")[3]) + 3


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, shortened by an ellipsis to at most `width` pixels."""
    text = " ".join(text.split())[:400]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Words broken into at most `lines` lines; the last one takes, and cuts, what is left."""
    words = text.split()[:60]
    result: list[str] = []
    while words and len(result) < lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        result.append(_cut(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*result, _cut(" ".join(words), font, width)] if words else result


def _write(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
) -> None:
    for number, line in enumerate(lines):
        draw.text((left, top + number * _line_height(font)), line, font=font, fill=PALE)


def _mark(draw: ImageDraw.ImageDraw, left: int, middle: int, *, right: bool) -> None:
    """A filled green disc for a right text, a grey ring for a wrong one."""
    box = (left + 2, middle - 5, left + 12, middle + 5)
    draw.ellipse(box, fill=RIGHT if right else None, outline=RIGHT if right else WRONG)
