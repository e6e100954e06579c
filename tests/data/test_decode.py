"""Decoding against other ways of computing the same pixels, and against damage."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from tests.fixtures.emoji import read_pairs
from trainer.data.decode import BadSample, DecodedImages, decode_image
from trainer.data.fields import find_image

WHITE = (255, 255, 255)
KINDS = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "WEBP": {"quality": 90},
}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, size: int, **options: object) -> torch.Tensor:
    options = {"background": WHITE, "max_pixels": 25_000_000, **options}
    return decode_image(data, size=size, **options)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure at every scale but that of single pixels."""
    noise = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    pixels = interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_an_image_of_the_wanted_size_comes_out_as_it_is():
    image = smooth(40, 40)
    assert torch.equal(decoded(encoded(image), 40), pixels_of(image))
    lossless = encoded(image, "WEBP", lossless=True)
    assert torch.equal(decoded(lossless, 40), pixels_of(image))


@pytest.mark.parametrize(("width", "height", "size"), [(96, 96, 33), (120, 80, 32), (60, 90, 64)])
def test_without_a_crop_the_shorter_side_is_resized_and_the_centre_kept(width, height, size):
    """Another way: torch's antialiased resampling of the whole image, then a centre crop."""
    image = smooth(width, height)
    wide, high = (side * size // min(width, height) for side in (width, height))
    whole = pixels_of(image)[None].float()
    whole = interpolate(whole, (high, wide), mode="bicubic", antialias=True).clamp(0, 255)[0]
    left, top = (wide - size) // 2, (high - size) // 2
    expected = whole[:, top : top + size, left : left + size]
    assert (decoded(encoded(image), size).float() - expected).abs().max() < 1.5


def test_a_crop_is_a_window_of_the_resampled_image():
    image = smooth(90, 70)
    expected = pixels_of(image.resize((36, 28), Image.Resampling.BICUBIC))[:, 2:26, 4:28]
    seen = []

    def crop(width: int, height: int) -> tuple[float, float, float, float]:
        seen.append((width, height))
        return (10.0, 5.0, 70.0, 65.0)

    found = decoded(encoded(image), 24, crop=crop)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert seen == [(90, 70)]


def test_transparent_pixels_show_the_background():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    alpha = pixels[..., 3:].astype(np.float64) / 255
    background = (10, 200, 90)
    expected = pixels[..., :3] * alpha + np.array(background) * (1 - alpha)
    found = decoded(encoded(Image.fromarray(pixels)), 16, background=background)
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1.0
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0] = 255  # the colour under a clear pixel must not bleed into the result
    assert torch.equal(decoded(encoded(Image.fromarray(clear)), 4), torch.full((3, 4, 4), 255))


def test_every_mode_becomes_rgb():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = torch.from_numpy(gray).expand(3, 16, 16)
    deep = gray.astype(np.uint16) * 257  # the same shades in 16 bits
    assert torch.equal(decoded(encoded(Image.fromarray(gray)), 16), three)
    assert torch.equal(decoded(encoded(Image.fromarray(deep)), 16), three)
    halves = Image.fromarray(np.stack([gray, np.full_like(gray, 128)], -1), "LA")
    expected = gray * (128 / 255) + 255 * (127 / 255)
    assert np.abs(decoded(encoded(halves), 16)[1].numpy() - expected).max() <= 1.0
    bits = Image.fromarray(gray > 99).convert("1")
    assert torch.equal(decoded(encoded(bits), 16)[0], torch.from_numpy((gray > 99) * 255).byte())


def test_palettes_and_their_transparent_entry():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    colour = torch.tensor([200, 100, 50]).byte()[:, None, None].expand(3, 8, 8)
    assert torch.equal(decoded(encoded(image), 8), colour)
    clear = decoded(encoded(image, transparency=1), 8, background=(1, 2, 3))
    assert torch.equal(clear, torch.tensor([1, 2, 3]).byte()[:, None, None].expand(3, 8, 8))


def test_cmyk_and_gray_jpegs():
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = decoded(encoded(inks, "JPEG", quality=95), 16)
    assert (red.float() - torch.tensor([255.0, 0, 0])[:, None, None]).abs().max() <= 6
    gray = decoded(encoded(Image.new("L", (16, 16), 77), "JPEG", quality=95), 16)
    assert (gray.float() - 77).abs().max() <= 2


def test_a_large_jpeg_is_decoded_smaller_only_where_that_can_not_be_seen():
    data = encoded(smooth(1024, 768), "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    box = (100.0, 60.0, 612.0, 572.0)
    for size in (32, 64, 128, 129, 256, 400):
        expected = pixels_of(whole.resize((size, size), Image.Resampling.BICUBIC, box=box))
        found = decoded(data, size, crop=lambda width, height: box)
        difference = (found.float() - expected.float()).abs()
        if 2 * 2 * size > 512:
            assert torch.equal(found, expected), size
        else:
            assert difference.max() <= 4, size
            assert difference.mean() < 0.5, size


def is_kept(data: bytes, size: int, kept: DecodedImages) -> bool:
    """A limit of one pixel refuses whatever has to be decoded."""
    try:
        decoded(data, size, kept=kept, max_pixels=1)
    except BadSample:
        return False
    return True


@pytest.mark.parametrize("kind", [*KINDS])
def test_kept_images_give_the_same_pixels_without_decoding(kind):
    """But for a JPEG that a large crop would decode at a fraction of its size."""
    boxes = [(0.0, 0.0, 300.0, 200.0), (10.5, 20.25, 80.0, 90.0), (40.0, 0.0, 240.0, 200.0)]
    mode = "RGB" if kind == "JPEG" else "RGBA"
    image = smooth(300, 200)
    image.putalpha(smooth(300, 200, seed=1).convert("L"))
    data, kept = encoded(image.convert(mode), kind, **KINDS[kind]), DecodedImages(1 << 20)
    for size in (16, 64):
        for box in boxes * 2:
            alone = decoded(data, size, crop=lambda width, height, box=box: box)
            found = decoded(data, size, crop=lambda width, height, box=box: box, kept=kept)
            assert torch.equal(found, alone)
        assert is_kept(data, size, kept) == (kind != "JPEG" or size == 64)


def test_no_more_images_are_kept_than_fit():
    images = [encoded(smooth(10, 10, seed=seed)) for seed in range(5)]
    kept = DecodedImages(3 * 400 + 399)
    for data in images * 2:
        decoded(data, 10, kept=kept)
    assert [is_kept(data, 10, kept) for data in images] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(kind):
    with pytest.raises(BadSample, match="not a PNG, JPEG, WEBP image"):
        decoded(encoded(smooth(8, 8), kind), 8)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"hello" * 100, b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(BadSample):
        decoded(data, 8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 10) + b"IDAT" + b"\0" * 14


@pytest.mark.parametrize("side", [5001, 9000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(side):
    """There are no pixels in it: whoever tried to decode them would report damage instead."""
    with pytest.raises(BadSample, match=r"pixels") as error:
        decoded(png_header(side, side), 64)
    assert "25000000" in error.value.reason
    with pytest.raises(BadSample, match="damaged"):
        decoded(png_header(4000, 4000), 64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pixel_cap_counts_for_every_format(kind):
    data = encoded(smooth(100, 50), kind, **KINDS[kind])
    assert decoded(data, 16, max_pixels=5000).shape == (3, 16, 16)
    with pytest.raises(BadSample, match="100 x 50 = 5000 pixels, over 4999"):
        decoded(data, 16, max_pixels=4999)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused_or_complete(kind):
    """Cutting what follows the last pixel (an end marker) may be harmless, nothing else."""
    data = encoded(smooth(60, 60), kind, **KINDS[kind])
    whole = decoded(data, 60)
    refused = 0
    random_cuts = random.Random(0).sample(range(len(data)), 100)
    for cut in [*random_cuts, *range(len(data) - 20, len(data))]:
        try:
            found = decoded(data[:cut], 60)
        except BadSample:
            refused += 1
        else:
            assert torch.equal(found, whole), f"cut at {cut} of {len(data)}"
    assert refused > 90


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_never_raise_anything_else(kind):
    data = encoded(smooth(40, 40), kind, **KINDS[kind])
    generator = random.Random(1)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(generator.choice((1, 1, 3, 20))):
            damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        try:
            found = decoded(bytes(damaged), 16, max_pixels=1_000_000)
        except BadSample:
            continue
        assert found.shape == (3, 16, 16)


def test_real_drawings_keep_their_white_ground():
    for record in read_pairs(20):
        found = decoded(record["png"], 64)
        assert found.shape == (3, 64, 64)
        assert found.float().std() > 5, record["name"]


def test_the_image_is_found_by_its_field():
    assert find_image({"txt": b"x", "webp": b"w", "jpg": b"j"}) == b"j"
    with pytest.raises(BadSample, match=r"cls, txt"):
        find_image({"txt": b"x", "cls": b"1"})
    named = {"input.jpg": b"i", "mask.png": b"m", "txt": b"x"}
    assert find_image(named, ["mask.png"]) == b"m"
    assert find_image(named, ["jpg"]) == b"i"
    assert find_image({"input.jpg": b"i"}) == b"i"
    with pytest.raises(BadSample, match=r"input.jpg and mask.png could all be .*data.images"):
        find_image(named)
    with pytest.raises(BadSample, match="no image"):
        find_image({"png": b"p"}, ["input.jpg"])


def _chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def by_hand(depth: int, kind: int, row: bytes, *further: bytes) -> bytes:
    """A PNG of 8 x 8 pixels with eight equal rows; chunks in front of the pixels and behind."""
    head = struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress((b"\0" + row) * 8))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", head), *further, pixels, _chunk(b"IEND", b"")]
    )


def _words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize(
    ("depth", "kind", "clear_half", "other_half", "clear"),
    [
        (1, 0, b"", b"\x0f", _words(0)),
        (1, 0, b"\xf0", b"", _words(1)),
        (2, 0, b"\x55", b"\xaa", _words(1)),
        (4, 0, b"\x55\x55", b"\x66\x66", _words(5)),
        (8, 0, b"\x55" * 4, b"\x56" * 4, _words(0x55)),
        (16, 0, _words(*[30000] * 4), _words(*[30001] * 4), _words(30000)),
        (16, 0, _words(*[0] * 4), _words(*[1] * 4), _words(0)),
        (8, 2, bytes([200, 30, 40]) * 4, bytes([200, 30, 41]) * 4, _words(200, 30, 40)),
        (16, 2, _words(51201, 7710, 3) * 4, _words(51201, 8000, 3) * 4, _words(51201, 7710, 3)),
    ],
)
def test_a_transparent_value_is_compared_in_the_depth_of_the_file(
    depth: int, kind: int, clear_half: bytes, other_half: bytes, clear: bytes
) -> None:
    """The first four pixels of a row are clear, the last four are not."""
    row = clear_half + other_half
    found = decoded(by_hand(depth, kind, row, _chunk(b"tRNS", clear)), 8, background=(1, 2, 3))
    plain = decoded(by_hand(depth, kind, row), 8)
    assert torch.equal(
        found[:, :, :4], torch.tensor([1, 2, 3]).byte()[:, None, None].expand(3, 8, 4)
    )
    assert torch.equal(found[:, :, 4:], plain[:, :, 4:])


@pytest.mark.parametrize("tag", [b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf", b"tIME"])
def test_notes_in_a_png_change_nothing_however_long_or_broken(tag: bytes) -> None:
    shades = bytes(range(0, 240, 30))
    plain = decoded(by_hand(8, 0, shades), 8)
    packed = zlib.compress(b"x" * 3_000_000)
    long = b"k\0\1\0\0\0" + packed if tag == b"iTXt" else b"k\0\0" + packed
    for body in (long, b"k\0" + b"y" * 100_000, b"", b"\xff" * 9):
        assert torch.equal(decoded(by_hand(8, 0, shades, _chunk(tag, body)), 8), plain)
    many = [_chunk(tag, long)] * 40
    assert torch.equal(decoded(by_hand(8, 0, shades, *many), 8), plain)


def test_a_png_cut_anywhere_is_a_bad_sample() -> None:
    whole = by_hand(8, 0, bytes(range(8)), _chunk(b"tEXt", b"k\0v"), _chunk(b"tRNS", _words(7)))
    for end in range(0, len(whole) - 20, 3):
        with pytest.raises(BadSample):
            decoded(whole[:end], 8)
