"""Where the points of a clustering are: in memory, or on disk and read ahead of their use.

Points never move: each rank has some, numbered from 0, and reads them block by block as often as
it needs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.cluster.exact import ordered_sum

BLOCKS_AHEAD = 2


@runtime_checkable
class Points(Protocol):
    """This rank's points; other ranks have others. Values do not depend on what is read at once."""

    @property
    def dim(self) -> int: ...

    @property
    def resident(self) -> bool:
        """Whether reading costs nothing, so that reading ahead would only cost memory."""
        ...

    def __len__(self) -> int: ...

    def ids(self, first: int, last: int) -> Int64[Tensor, " n"]:
        """Sample ids of the points first to last - 1."""
        ...

    def rows(self, first: int, last: int) -> Float[Tensor, "n d"]:
        """The points first to last - 1. Called from one thread at a time."""
        ...

    def take(self, places: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Points by their number, in any order."""
        ...


@runtime_checkable
class Finished(Protocol):
    """Points that are read as they are stored, and finished where they are used."""

    def stored(self, first: int, last: int) -> Float[Tensor, "n d"]:
        """What `finish` makes the points of. Called from one thread at a time."""
        ...

    def finish(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The same points on any device."""
        ...


class Resident:
    """Points in memory (or in one mapped file that torch sees as a tensor)."""

    resident = True

    def __init__(self, rows: Float[Tensor, "n d"], ids: Int64[Tensor, " n"]) -> None:
        if len(rows) != len(ids):
            raise ValueError(f"{len(rows)} points and {len(ids)} ids")
        self._rows, self._ids = rows, ids

    @property
    def dim(self) -> int:
        return self._rows.shape[1]

    def __len__(self) -> int:
        return self._rows.shape[0]

    def ids(self, first: int, last: int) -> Int64[Tensor, " n"]:
        return self._ids[first:last]

    def rows(self, first: int, last: int) -> Float[Tensor, "n d"]:
        return self._rows[first:last]

    def take(self, places: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return self._rows[places.to(self._rows.device)]


class UnitLength:
    """Points scaled to length one as they are read; zero rows stay zero."""

    def __init__(self, points: Points) -> None:
        self._points = points
        self.dim, self.resident = points.dim, points.resident

    def __len__(self) -> int:
        return len(self._points)

    def ids(self, first: int, last: int) -> Int64[Tensor, " n"]:
        return self._points.ids(first, last)

    def rows(self, first: int, last: int) -> Float[Tensor, "n d"]:
        return unit_rows(self._points.rows(first, last))

    def take(self, places: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return unit_rows(self._points.take(places))


class Chosen:
    """Some of the points: those at `places` (ascending)."""

    resident = False

    def __init__(self, points: Points, places: Int64[Tensor, " n"]) -> None:
        self._points, self._places = points, places
        self.dim = points.dim

    def __len__(self) -> int:
        return self._places.shape[0]

    def ids(self, first: int, last: int) -> Int64[Tensor, " n"]:
        places = self._places[first:last]
        if len(places) == 0:
            return self._points.ids(0, 0)
        low = int(places[0])
        return self._points.ids(low, int(places[-1]) + 1)[places - low]

    def rows(self, first: int, last: int) -> Float[Tensor, "n d"]:
        places = self._places[first:last]
        if len(places) == 0:
            return self._points.rows(0, 0)
        low = int(places[0])
        return self._points.rows(low, int(places[-1]) + 1)[places - low]

    def take(self, places: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return self._points.take(self._places[places])


def stream(
    points: Points, size: int, device: torch.device, *, within: slice | None = None
) -> Iterator[tuple[slice, Float[Tensor, "n d"]]]:
    """Blocks of at most `size` points in float32 on the device, each with its place.

    What is not resident is read by a thread, two blocks ahead of the one in use. `within`: only
    these points.
    """
    begin, end = (0, len(points)) if within is None else (within.start, within.stop)
    spans = [slice(first, min(first + size, end)) for first in range(begin, end, size)]
    if points.resident:
        for span in spans:
            yield span, points.rows(span.start, span.stop).to(device, torch.float32)
        return
    read, finish = points.rows, _in_float32
    if isinstance(points, Finished):
        read, finish = points.stored, points.finish
    with ThreadPoolExecutor(1) as reader:
        pending: deque[tuple[slice, Future[Tensor]]] = deque()
        try:
            for span in spans:
                pending.append((span, reader.submit(read, span.start, span.stop)))
                if len(pending) > BLOCKS_AHEAD:
                    place, rows = pending.popleft()
                    yield place, finish(rows.result().to(device))
            while pending:
                place, rows = pending.popleft()
                yield place, finish(rows.result().to(device))
        finally:
            reader.shutdown(cancel_futures=True)


def stream_ids(points: Points, size: int) -> Iterator[tuple[slice, Int64[Tensor, " n"]]]:
    """The sample ids of all points, in blocks, each with its place."""
    for first in range(0, len(points), size):
        span = slice(first, min(first + size, len(points)))
        yield span, points.ids(span.start, span.stop)


def _in_float32(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows.float()


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows scaled to length one in float32; zero rows stay zero. A function of each row alone."""
    exact = rows.double()
    lengths = ordered_sum(exact.square()).sqrt()[:, None]
    return (exact / lengths.clamp(min=torch.finfo(torch.float64).tiny)).float()
