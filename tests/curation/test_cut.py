"""The cut of an order that does not fit into memory is that of a sorted one."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.curation.cut import cut_after
from trainer.curation.policy import first_of_each

COUNT = 500


def samples(kind: str) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    ids = draw.integers(-(2**62), 2**62, COUNT)
    order = {
        "hashes": draw.uniform(size=COUNT),
        "ties": -np.float16(draw.integers(-3, 4, COUNT) / 8).astype(np.float64),
        "all equal": np.zeros(COUNT),
        "any": draw.normal(size=COUNT) * 10.0 ** draw.integers(-200, 200, COUNT),
    }[kind]
    return order, ids


def kept(comm: Comm, kind: str, count: int, rows_at_once: int) -> list[int]:
    """Ids that the cut keeps, this rank reading its share in pieces."""
    order, ids = (column[comm.rank :: comm.world_size] for column in samples(kind))

    def columns():
        yield from zip(np.array_split(order, 7), np.array_split(ids, 7), strict=True)

    cut = cut_after(columns, count, comm, rows_at_once=rows_at_once)
    chosen = ids if cut is None else ids[cut.keeps(order, ids)]
    return chosen.tolist()


def expected(kind: str, count: int) -> list[int]:
    order, ids = samples(kind)
    first = first_of_each(np.zeros(COUNT, np.int64), order, ids, np.array([count]))
    return sorted(ids[first].tolist())


@pytest.mark.parametrize("kind", ["hashes", "ties", "all equal", "any"])
@pytest.mark.parametrize("count", [0, 1, 2, 77, COUNT - 1, COUNT, COUNT + 9])
def test_it_keeps_what_sorting_all_keeps(kind, count):
    for rows_at_once in (1, 10, 10**6):
        assert sorted(kept(Comm.solo(), kind, count, rows_at_once)) == expected(kind, count)


def several(comm: Comm) -> list[list[int]]:
    return [kept(comm, kind, 77, 10) for kind in ("hashes", "ties", "all equal", "any")]


def test_three_ranks_cut_where_one_does():
    shares = zip(*run_ranks(several, 3), strict=True)
    for kind, each in zip(("hashes", "ties", "all equal", "any"), shares, strict=True):
        assert sorted(chain.from_iterable(each)) == expected(kind, 77)
