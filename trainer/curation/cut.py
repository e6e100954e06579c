"""The first so many of samples that do not fit into memory together: where to cut their order.

Sixteen bits of the order after another, and then of the ids, are counted over all ranks until the
bin that holds the cut is small enough to be sorted. Nearly always that is after one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt64
from numpy.typing import NDArray

from trainer.comm import Comm, agreed

_BITS = 16
_SIGN = np.uint64(1 << 63)
Columns = Callable[[], Iterable[tuple[Float64[np.ndarray, " n"], Int64[np.ndarray, " n"]]]]
"""Order and ids of this rank's samples, some at a time; asked for once a pass."""


class Cut(NamedTuple):
    """The last sample that is kept."""

    order: int
    id: int

    def keeps(
        self, order: Float64[np.ndarray, " n"], ids: Int64[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        first, then = _sortable(order), _unsigned(ids)
        ties = (first == self.order) & (then <= self.id)
        return np.asarray((first < self.order) | ties)


def cut_after(columns: Columns, count: int, comm: Comm, *, rows_at_once: int) -> Cut | None:
    """The cut behind the `count` samples that come first, of equal order the lower id; None where
    there are not more than `count`. Memory: `rows_at_once` pairs, whatever the number of samples.
    """
    found: list[int] = []
    left = count
    for digit in range(2 * 64 // _BITS):
        table = _counted(columns, found, comm)
        if not found and int(table.sum()) <= count:
            return None
        if not count:
            return Cut(-1, -1)
        upto = np.cumsum(table)
        place = int(np.searchsorted(upto, left))
        left -= int(upto[place] - table[place])
        found.append(place)
        if table[place] <= rows_at_once or digit == 2 * 64 // _BITS - 1:
            break
    pairs = _gathered(columns, found, comm)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Cut(*(int(value) for value in pairs[order[left - 1]]))


def _counted(columns: Columns, found: list[int], comm: Comm) -> NDArray[np.int64]:
    """How many samples have each value of the next digit, of those whose digits so far agree."""
    table = torch.zeros(1 << _BITS, dtype=torch.int64)

    def count() -> None:
        for pairs in _agreeing(columns, found):
            digits = _digit(pairs, len(found)).astype(np.int64)
            table.add_(torch.from_numpy(np.bincount(digits, minlength=1 << _BITS)))

    agreed(comm, count)
    return np.asarray(comm.sum(table.to(comm.device)).cpu().numpy())


def _gathered(columns: Columns, found: list[int], comm: Comm) -> UInt64[np.ndarray, "n 2"]:
    """The samples of the last bin, of all ranks."""
    own = [np.empty((0, 2), np.uint64)]
    agreed(comm, lambda: own.extend(_agreeing(columns, found)))
    rows = torch.from_numpy(np.concatenate(own).view(np.int64)).to(comm.device)
    return np.asarray(comm.gather_rows(rows).cpu().numpy().view(np.uint64))


def _agreeing(columns: Columns, found: list[int]) -> Iterable[UInt64[np.ndarray, "n 2"]]:
    for order, ids in columns():
        pairs = np.stack([_sortable(order), _unsigned(ids)], axis=1)
        for place, digit in enumerate(found):
            pairs = pairs[_digit(pairs, place) == digit]
        yield pairs


def _digit(pairs: UInt64[np.ndarray, "n 2"], place: int) -> UInt64[np.ndarray, " n"]:
    column, part = divmod(place, 64 // _BITS)
    shift = np.uint64(64 - _BITS * (part + 1))
    return np.asarray((pairs[:, column] >> shift) & np.uint64((1 << _BITS) - 1))


def _sortable(order: Float64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Whole numbers that ascend as the floats do."""
    bits = (order + 0.0).view(np.uint64)  # minus zero is zero
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _unsigned(ids: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    return np.asarray(ids.view(np.uint64) ^ _SIGN)
