"""Perceptual hashes: near pictures share bits, and bands lose no pair."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.curation.corpus import picture
from trainer.curation.perceptual import SIDE, distances, perceptual_hash, repeats_within
from trainer.data.decode import decode_image


def hash_of(data: bytes) -> int:
    squeezed = decode_image(
        data,
        size=SIDE,
        background=(255, 255, 255),
        max_pixels=10**6,
        crop=lambda width, height: (0.0, 0.0, float(width), float(height)),
    )
    return perceptual_hash(squeezed.numpy())


def as_jpeg(data: bytes, quality: int) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((96, 112)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_a_picture_keeps_its_hash_through_size_format_and_light_and_others_have_other_ones():
    hashes = np.array([hash_of(picture(n)) for n in range(40)])
    for n in range(10):
        changed = [as_jpeg(picture(n), 80), picture(n, side=64), picture(n, shift=8)]
        near = distances(np.array([hash_of(data) for data in changed]), hashes[n : n + 1])
        assert near.max() <= 6
    others = distances(hashes, hashes) + 64 * np.eye(40, dtype=np.uint8)
    assert others.min() > 12


@pytest.mark.parametrize("most", [0, 1, 4, 9])
def test_bands_find_every_pair_that_comparing_all_finds(most):
    draw = np.random.default_rng(most)
    hashes = draw.integers(-(2**63), 2**63, 300, dtype=np.int64)
    for n in range(100, 300):
        flips = draw.choice(64, draw.integers(0, 12), replace=False)
        hashes[n] = hashes[n - 100] ^ np.bitwise_or.reduce(
            np.left_shift(np.uint64(1), flips.astype(np.uint64)), initial=np.uint64(0)
        ).view(np.int64)
    ids = draw.permutation(300).astype(np.int64)
    near = distances(hashes, hashes) <= most
    earlier = ids[None] < ids[:, None]
    assert repeats_within(hashes, ids, most).tolist() == (near & earlier).any(1).tolist()
