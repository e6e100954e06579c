"""Bytes of one image to pixels: allowed formats, a cap before decoding, one resampling.

The first frame of PNG, JPEG and WebP files; anything else is refused. EXIF orientation is not
applied, as in the public CLIP pipelines.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trainer.data.jpeg import plain_jpeg
from trainer.data.png import plain_png

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; fractions of a pixel are fine."""

FORMATS = ("PNG", "JPEG", "WEBP")

_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow raises on damaged files; an unknown format is an OSError too."""

LONGEST = 64
"""Sides of a view: of an image that is longer still, the whole is not resized for its centre."""
_DRAFT_GAP = 2
"""A JPEG is decoded at a fraction of its size only where this many times the wanted pixels remain,
so that the antialiased resampling still decides what the result looks like."""


class BadSample(Exception):
    """One sample that can't be used; the reason goes to the ledger, training goes on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DecodedImages:
    """Decoded images kept in memory, by a hash of their bytes, until `capacity_bytes` are full.

    What came first stays: where every epoch has another order, each image is as likely to be
    wanted next as any other, and replacing one by another gains nothing.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._free_bytes = capacity_bytes
        self._images: dict[bytes, Image.Image] = {}

    def get(self, data: bytes) -> Image.Image | None:
        return self._images.get(_digest(data))

    def put(self, data: bytes, image: Image.Image) -> None:
        """Keep it if it fits."""
        size = 4 * image.width * image.height  # Pillow pads RGB to four bytes a pixel
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._images[_digest(data)] = image


def decode_image(
    data: bytes,
    *,
    size: int,
    background: tuple[int, int, int],
    max_pixels: int,
    crop: Callable[[int, int], Box] | None = None,
    kept: DecodedImages | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> UInt8[Tensor, "3 {size} {size}"]:
    """Decode, composite over `background` and resample a box of the image to a square.

    `crop(width, height)` gives the box; without it, CLIP's centre crop (`centre_crop`), of every
    pixel of the file. A box is resampled with the filter that Pillow numbers `resample`, bicubic
    otherwise, antialiased; pixels just outside the box weigh in, as in an image
    that is resized before it is cropped.
    `kept` saves decoding again what it holds and never changes the result; its images have one
    `background`.
    BadSample for a format that is not allowed, more than `max_pixels` (known from the header,
    nothing is decoded) and damaged data.
    """
    try:
        image = None if kept is None else kept.get(data)
        if image is None:
            image, box = _decoded(data, size, background, max_pixels, crop, kept)
        else:
            box = crop(*image.size) if crop else None
        square = (
            centre_crop(image, size)
            if box is None
            else image.resize((size, size), Image.Resampling(resample), box=box)
        )
    except _DAMAGE as error:
        raise BadSample(f"damaged image of {len(data)} bytes: {_first_line(error)}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def decode_whole(data: bytes, *, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    """Every pixel of an image, in RGB, over `background`; BadSample as `decode_image`."""
    try:
        return _flatten(_open(data, max_pixels), background)
    except _DAMAGE as error:
        raise BadSample(f"damaged image of {len(data)} bytes: {_first_line(error)}") from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """CLIP's evaluation view, pixel for pixel as `transformers` computes it.

    The shorter side is resized to `size`, the longer one to whole pixels (rounded down), and
    `size` of them are cropped from a whole offset (rounded down).
    """
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    offset = (longer - size) // 2
    if longer > LONGEST * size:  # the whole would not fit into memory: only the box is resized
        scale = max(width, height) / longer
        start, end = offset * scale, (offset + size) * scale
        box = (start, 0.0, end, height) if width > height else (0.0, start, width, end)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if width > height:
        whole = image.resize((longer, size), Image.Resampling.BICUBIC)
        return whole.crop((offset, 0, offset + size, size))
    whole = image.resize((size, longer), Image.Resampling.BICUBIC)
    return whole.crop((0, offset, size, offset + size))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only."""
    try:
        image = Image.open(io.BytesIO(plain_jpeg(plain_png(data))), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample(f"not a {', '.join(FORMATS)} image ({len(data)} bytes)") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"over {max_pixels} pixels: {_first_line(error)}") from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise BadSample(f"{image.width} x {image.height} = {pixels} pixels, over {max_pixels}")
    return image


def _decoded(
    data: bytes,
    size: int,
    background: tuple[int, int, int],
    max_pixels: int,
    crop: Callable[[int, int], Box] | None,
    kept: DecodedImages | None,
) -> tuple[Image.Image, Box | None]:
    """The flattened image and the crop's box in its pixels; kept where every crop would decode it
    so."""
    opened = _open(data, max_pixels)
    box = crop(*opened.size) if crop else None
    in_full = _draft_factor(opened, _whole(opened), size) == 1
    decoded, box = (opened, None) if box is None else _decode_box(opened, box, size)
    image = _flatten(decoded, background)
    if kept is not None and in_full:
        kept.put(data, image)
    return image, box


def _decode_box(image: Image.Image, box: Box, size: int) -> tuple[Image.Image, Box]:
    """Decode; a JPEG at 1/2, 1/4 or 1/8 of its size where the box stays large enough."""
    shrink = _draft_factor(image, box, size)
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image.load()
    width, height = image.size
    left, top, right, bottom = (edge / shrink for edge in box)
    return image, (left, top, min(right, float(width)), min(bottom, float(height)))


def _whole(image: Image.Image) -> Box:
    return 0.0, 0.0, float(image.width), float(image.height)


def _draft_factor(image: Image.Image, box: Box, size: int) -> int:
    if image.format != "JPEG":
        return 1
    extent = min(box[2] - box[0], box[3] - box[1])
    return next((f for f in (8, 4, 2) if extent >= f * _DRAFT_GAP * size), 1)


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode to RGB; transparency shows the background."""
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits as one of 8, with alpha where a value of the 16 is transparent."""
    deep = np.asarray(image)
    gray = (deep >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if clear is None:
        return Image.fromarray(gray)
    alpha = np.where(deep == clear, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([gray, alpha], axis=-1), "LA")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
