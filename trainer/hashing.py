"""Randomness as a pure function: the same (seed, purpose, id) always draws the same number.

Nothing here has a state, so worker count, world size and restarts can't change what is drawn.
The mixer is splitmix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", 2014), chained over the keys.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int64."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _signed(_MULTIPLIERS[0])
    bits = (bits ^ _shifted(bits, 27)) * _signed(_MULTIPLIERS[1])
    return bits ^ _shifted(bits, 31)


def key_of(*parts: int | str) -> int:
    """A signed 64-bit key of a seed, names and numbers; equal on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def hash_bits(ids: Int64[Tensor, "*shape"], *keys: int | Tensor) -> Int64[Tensor, "*shape"]:
    """64 well-mixed bits per id, for each sequence of keys independent of every other.

    A key may be a tensor of keys, each for its place among the ids.
    """
    bits = _mixed(ids + _signed(_GOLDEN))
    for key in keys:
        bits = _mixed(bits ^ (key if isinstance(key, Tensor) else _signed(key))) + _signed(_GOLDEN)
    return _mixed(bits)


def uniform(ids: Int64[Tensor, "*shape"], *keys: int | Tensor) -> Float64[Tensor, "*shape"]:
    """A float64 in [0, 1) per id, a pure function of the id and the keys (53 bits)."""
    return _shifted(hash_bits(ids, *keys), 11).to(torch.float64) * 2.0**-53


def uniform_of(value: int, *keys: int) -> float:
    """`uniform` of one id, in plain integers: fifty times cheaper than a tensor of one."""
    return (hash_bits_of(value, *keys) >> 11) * 2.0**-53


def hash_bits_of(value: int, *keys: int) -> int:
    """`hash_bits` of one id, as a number without a sign."""
    bits = _mixed_one(value + _GOLDEN)
    for key in keys:
        bits = _mixed_one(bits ^ key) + _GOLDEN
    return _mixed_one(bits) & _MASK


def _mixed_one(bits: int) -> int:
    bits &= _MASK
    bits = ((bits ^ (bits >> 30)) * _MULTIPLIERS[0]) & _MASK
    bits = ((bits ^ (bits >> 27)) * _MULTIPLIERS[1]) & _MASK
    return bits ^ (bits >> 31)


def permutation(count: int, *keys: int) -> Int64[Tensor, " count"]:
    """A permutation of 0..count-1 that depends on the keys alone."""
    bits = hash_bits(torch.arange(count, dtype=torch.int64), *keys)
    return torch.argsort(bits, stable=True)
