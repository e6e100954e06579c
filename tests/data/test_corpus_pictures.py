"""Pictures: one form for all of them, and a hash of what is seen, not of how it is stored."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.fixtures.emoji import read_pairs
from trainer.data.corpus.pictures import SIDE, pixel_hash, render_svg, square_png


def stored(picture: Image.Image, form: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.sampled_from(["RGBA", "RGB", "P", "L", "LA"]),
    st.sampled_from(["PNG", "WEBP"]),
)
def test_any_picture_becomes_a_square_of_one_form(
    size: tuple[int, int], mode: str, form: str
) -> None:
    picture = Image.new(mode, size, 1)
    if form == "WEBP":
        picture = picture.convert("RGBA")
    square = square_png(stored(picture, form))
    assert (opened(square).format, opened(square).mode) == ("PNG", "RGBA")
    assert opened(square).size == (SIDE, SIDE)
    assert square_png(square) == square


def test_a_wide_picture_is_centred_on_nothing() -> None:
    square = opened(square_png(stored(Image.new("RGB", (72, 24), (255, 0, 0)))))
    alpha = np.asarray(square)[:, :, 3]
    assert (alpha[24:48] == 255).all()
    assert (alpha[:24] == 0).all()
    assert (alpha[48:] == 0).all()


def test_the_hash_ignores_how_a_picture_is_stored() -> None:
    data = square_png(read_pairs(1)[0]["png"])
    picture = opened(data)
    again = stored(picture, compress_level=0)
    assert again != data
    assert pixel_hash(again) == pixel_hash(data)
    page = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    page.alpha_composite(picture)
    assert pixel_hash(stored(page.convert("RGB"))) == pixel_hash(data)


def test_the_hash_tells_real_pictures_apart() -> None:
    hashes = {pixel_hash(pair["png"]) for pair in read_pairs()}
    assert len(hashes) == 200


def test_icons_are_drawn_in_dark_grey_where_they_name_no_colour() -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><path fill="currentColor" '
    svg += b'd="M0 0h1v2h-1z"/></svg>'
    pixels = np.asarray(opened(render_svg(svg)))
    assert (pixels[:, :36] == (32, 32, 32, 255)).all()
    assert (pixels[:, 36:, 3] == 0).all()


@pytest.mark.parametrize("data", [b"", b"<svg", b"no picture", b"\xff\xfe", b"<svg" + b" " * 2**21])
def test_what_cannot_be_drawn_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the renderer's own words
        render_svg(data)


@pytest.mark.parametrize("cut", [0, 8, 100, 600])
def test_a_damaged_picture_is_a_value_error(cut: int) -> None:
    with pytest.raises(ValueError, match="no readable picture"):
        square_png(read_pairs(1)[0]["png"][:cut])
