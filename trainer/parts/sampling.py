"""Which rows of a sharded table a step compares with."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from trainer.hashing import key_of, uniform

Sampling = Literal["rows", "blocks"]

BLOCK = 128
"""Rows that are drawn together, so that a device reads them in one piece."""
CHUNK = 1 << 16
"""Numbers hashed at a time: they stay in the cache through the mixer's thirty passes."""
FEWEST = 16
"""Rows, or blocks, that a step draws on average at least: fewer than one in a million draw none."""


def rate_with_negatives(rate: float, num_rows: int, *, labels: int, sampling: Sampling) -> float:
    """`rate`, or the higher one at which a small table still gives each sample negatives.

    A sample's own `labels` rows are none, so as many more are drawn. Zero stays zero.
    """
    drawn = -(-num_rows // BLOCK) if sampling == "blocks" else num_rows
    least = FEWEST if sampling == "blocks" else FEWEST + labels
    return min(1.0, max(rate, least / drawn)) if rate > 0 else 0.0


def sampled_ids(
    first: int,
    last: int,
    *,
    rate: float,
    sampling: Sampling,
    seed: int,
    step: int,
    slot: int | None = None,
    device: torch.device | str = "cpu",
) -> Int64[Tensor, " sampled"]:
    """Those of the rows [first, last) that are in the sample of a step, ascending.

    A row is in it if a hash of (seed, step, row) is below `rate`, or of its block of 128. So
    every division of a table into ranges draws the same sample, and each step another; where a
    step has several, each `slot` another.
    """
    return places(
        sampled_rows(
            *(first, last),
            rate=rate,
            sampling=sampling,
            seed=seed,
            step=step,
            slot=slot,
            device=device,
        ),
        first,
    )


def sampled_rows(
    first: int,
    last: int,
    *,
    rate: float,
    sampling: Sampling,
    seed: int,
    step: int,
    slot: int | None = None,
    device: torch.device | str = "cpu",
) -> Bool[Tensor, " rows"]:
    """Which of the rows [first, last) are `sampled_ids`. Nothing waits for the device."""
    if rate >= 1:
        return torch.ones(last - first, dtype=torch.bool, device=device)
    key = key_of("negatives", seed, step, *(() if slot is None else (slot,)))
    if sampling == "rows":
        return _below(first, last, rate, key, device)
    begin = first // BLOCK
    blocks = _below(begin, -(-last // BLOCK), rate, key, device)
    rows = blocks[:, None].expand(-1, BLOCK).flatten()
    return rows[first - begin * BLOCK : last - begin * BLOCK]


def places(chosen: Bool[Tensor, " rows"], first: int) -> Int64[Tensor, " chosen"]:
    """Ids of the chosen rows, ascending, of which the first has the id `first`. Waits once."""
    return chosen.nonzero().flatten() + first


def _below(first: int, last: int, rate: float, key: int, device: torch.device | str) -> Tensor:
    # A host hashes what fits its cache; a device wants all of it at once.
    size = CHUNK if torch.device(device).type == "cpu" else max(1, last - first)
    found = torch.empty(max(0, last - first), dtype=torch.bool, device=device)
    for at in range(first, last, size):
        ids = torch.arange(at, min(at + size, last), device=device)
        torch.lt(uniform(ids, key), rate, out=found[at - first : at - first + len(ids)])
    return found
