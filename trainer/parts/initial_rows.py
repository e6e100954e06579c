"""Where the rows of a sharded table start: the same for every division of it into ranges."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor

from trainer.errors import ConfigError
from trainer.hashing import hash_bits, key_of

CHUNK = 1 << 16
"""Numbers drawn at a time: they stay in the cache through the mixer's thirty passes."""


def normal_rows(
    first: int, last: int, dim: int, *, deviation: float, seed: int
) -> Float[Tensor, "rows dim"]:
    """Rows [first, last) of a table of independent normal numbers, on the host in float32.

    Each pair of numbers is a function of the seed and its place in the whole table.
    """
    width = -(-dim // 2)
    rows = torch.empty(last - first, dim)
    size = max(1, CHUNK // width)
    key = key_of("prototypes", seed)
    for at in range(first, last, size):
        end = min(at + size, last)
        pairs = _normal_pairs(torch.arange(at * width, end * width), key).view(end - at, 2 * width)
        torch.mul(pairs[:, :dim], deviation, out=rows[at - first : end - first])
    return rows


def _normal_pairs(ids: Tensor, key: int) -> Tensor:
    """Two normal numbers from the two halves of each id's 64 bits, by Box and Muller."""
    bits = hash_bits(ids, key)
    one = ((bits >> 32) & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32).float()
    other = (bits & 0xFFFFFFFF).float().mul_(2.0**-32 * 2 * math.pi)
    radius = one.log_().mul_(-2.0).sqrt_()
    return torch.stack([radius * other.cos(), radius * other.sin()], dim=1)


def stored_rows(
    path: Path, first: int, last: int, *, shape: tuple[int, int], deviation: float
) -> Float[Tensor, "rows dim"]:
    """Rows [first, last) of the one table in a safetensors file, each scaled to the length that
    normal numbers of this deviation would have: only directions count in the losses, but the
    length sets how far a step turns a row.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tables = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            fitting = [name for name, found in tables.items() if found == shape]
            if len(fitting) != 1:
                raise ConfigError(
                    f"{path} has {len(fitting)} tables of {shape[0]} x {shape[1]} numbers and must "
                    f"have one; it holds {tables}"
                )
            rows: Tensor = file.get_slice(fitting[0])[first:last].float()
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"can't read the prototypes in {path}: {error}") from error
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((lengths > 0).all() & torch.isfinite(lengths).all()):
        raise ConfigError(f"a row of {path} is zero or not finite and has no direction")
    return rows.mul_(deviation * math.sqrt(shape[1]) / lengths)
