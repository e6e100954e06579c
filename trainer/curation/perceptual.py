"""A hash of 64 bits that near-equal pictures share but for a few bits, and who has such a peer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray

SIDE = 32
"""Pixels per side that a picture is squeezed to."""
_KEPT = 8
_PAIRS_AT_ONCE = 2048
_BITS = 64


def perceptual_hash(picture: UInt8[np.ndarray, "3 32 32"]) -> int:
    """Signs of the 8 x 8 lowest cosine coefficients of the grey picture, less their median.

    The constant one is left out of the median. As a signed number of 64 bits.
    """
    grey = np.tensordot([0.299, 0.587, 0.114], picture.astype(np.float64), axes=1)
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = np.round(low, 6) > np.round(np.median(low[1:]), 6)
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)


def distances(
    hashes: Int64[np.ndarray, " n"], others: Int64[np.ndarray, " m"]
) -> UInt8[np.ndarray, "n m"]:
    """In how many bits each differs from each."""
    differing = hashes[:, None] ^ others[None]
    return np.asarray(np.bitwise_count(differing.view(np.uint64)), np.uint8)


def repeats_within(
    hashes: Int64[np.ndarray, " n"], ids: Int64[np.ndarray, " n"], most: int
) -> Bool[np.ndarray, " n"]:
    """Whether a sample of a lower id differs in at most `most` bits.

    Two hashes that differ in k bits agree in at least one of k + 1 bands, so only members of a
    band are compared: exact, and far from all pairs.
    """
    found = np.zeros(len(ids), bool)
    for band in range(most + 1):
        found |= repeats_in_band(hashes, ids, band, most)
    return found


def repeats_in_band(
    hashes: Int64[np.ndarray, " n"], ids: Int64[np.ndarray, " n"], band: int, most: int
) -> Bool[np.ndarray, " n"]:
    """The same, among samples that agree in one of the bands."""
    values = band_values(hashes, band, most)
    order = np.lexsort((ids, values))
    found = np.zeros(len(ids), bool)
    for first, last in _runs(values[order]):
        members = order[first:last]
        found[members] |= _late(hashes[members], most)
    return found


def band_values(hashes: Int64[np.ndarray, " n"], band: int, most: int) -> Int64[np.ndarray, " n"]:
    """The bits of one of `most` + 1 bands of nearly equal width."""
    edges = np.linspace(0, _BITS, most + 2).astype(int)
    low, width = int(edges[band]), int(edges[band + 1] - edges[band])
    shifted = hashes.view(np.uint64) >> np.uint64(low)
    mask = np.uint64((1 << width) - 1)
    return np.asarray((shifted & mask).view(np.int64))


def _late(hashes: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
    """Which are near an earlier one."""
    found = np.zeros(len(hashes), bool)
    for first in range(0, len(hashes), _PAIRS_AT_ONCE):
        tile = hashes[first : first + _PAIRS_AT_ONCE]
        for begin in range(0, first + 1, _PAIRS_AT_ONCE):
            near = distances(tile, hashes[begin : begin + _PAIRS_AT_ONCE]) <= most
            if begin == first:
                near = np.tril(near, -1)
            found[first : first + len(tile)] |= near.any(axis=1)
    return found


def _runs(values: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where equal values that come more than once begin and end."""
    edges = np.flatnonzero(np.r_[True, values[1:] != values[:-1], True])
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if last - first > 1:
            yield first, last


def _cosines(count: int, size: int) -> Float[np.ndarray, "count size"]:
    """The first rows of the cosine transform (type II), without a scale."""
    places = np.arange(size) + 0.5
    return np.cos(np.pi / size * np.arange(count)[:, None] * places[None])


_COSINES = _cosines(_KEPT, SIDE)
