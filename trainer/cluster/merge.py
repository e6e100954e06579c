"""One map of the samples of all ranks, ascending by id, that no rank ever holds.

Ids are hashes, so a range of them has its share of the samples. Every rank writes what it has,
divided into ranges, into files of its own; then the ranges are dealt, and each is sorted by one
rank into its place in the map.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64
from numpy.typing import NDArray

from trainer.checkpoint.manifest import sync_folder
from trainer.comm import Comm, agreed
from trainer.data.labels import IDS, LABELS
from trainer.errors import DataError

_BITS = 10  # of an id's 64, whose sign is never set: 512 ranges
_FOLDER = "merging"


class Rows(NamedTuple):
    """Samples and the clusters of each, the nearest first."""

    ids: Int64[np.ndarray, " n"]
    lists: Int32[np.ndarray, "n l"]


class _Stretch(NamedTuple):
    """Rows of a rank's files that belong to one range."""

    rank: int
    begin: int
    end: int


def write_map(out: Path, rows: Iterable[Rows], width: int, comm: Comm) -> int:
    """Write `ids.npy` and `labels.npy` of all ranks' rows, `width` clusters each; their number.

    Every rank calls, with its own rows, in a folder that all see. An id that is given twice keeps
    its lowest list. A rank holds one range, a 512th of all, and what `rows` gives at once.
    """
    folder = out / _FOLDER
    agreed(comm, lambda: folder.mkdir(parents=True, exist_ok=True))
    own = agreed(comm, lambda: _spread(folder, rows, width, comm.rank))
    stretches: dict[int, list[_Stretch]] = {}
    for rank, ranges in enumerate(comm.gather_json(own)):
        for number, begin, end in ranges:
            stretches.setdefault(number, []).append(_Stretch(rank, begin, end))
    numbers = sorted(stretches)
    mine = numbers[comm.rank :: comm.world_size]
    sizes = agreed(comm, lambda: {n: _sorted(folder, n, stretches[n], width) for n in mine})
    everyone = {int(n): size for part in comm.gather_json(sizes) for n, size in part.items()}
    count: int = sum(everyone.values())
    begins = dict(zip(numbers, np.cumsum([0, *(everyone[n] for n in numbers)]), strict=False))
    agreed(comm, lambda: _allot(out, count, width) if comm.is_main else None)
    agreed(comm, lambda: _place(out, folder, {n: int(begins[n]) for n in mine}, width))
    agreed(comm, lambda: _finish(out, folder) if comm.is_main else None)
    return count


def _spread(folder: Path, rows: Iterable[Rows], width: int, rank: int) -> list[list[int]]:
    """Append rows to this rank's files, range after range; where each range lies in them."""
    found: list[list[int]] = []
    first = 0
    with (folder / f"{rank}.ids").open("wb") as ids, (folder / f"{rank}.lists").open("wb") as lists:
        for some in rows:
            if some.lists.shape[1] != width:
                raise DataError(f"a sample has {some.lists.shape[1]} clusters, another {width}")
            which = (some.ids.view("<u8") ^ np.uint64(1 << 63)) >> np.uint64(64 - _BITS)
            order = np.argsort(which, kind="stable")
            ids.write(some.ids[order].data)
            lists.write(some.lists[order].data)
            numbers, counts = np.unique(which, return_counts=True)
            ends = first + np.cumsum(counts)
            found += np.stack([numbers.astype(np.int64), ends - counts, ends], 1).tolist()
            first += len(some.ids)
    return found


def _sorted(folder: Path, number: int, stretches: Sequence[_Stretch], width: int) -> int:
    """Write one range in ascending order, each id once; its size."""
    ids = np.concatenate([_read(folder / f"{s.rank}.ids", s, "<i8", 1)[:, 0] for s in stretches])
    lists = np.concatenate([_read(folder / f"{s.rank}.lists", s, "<i4", width) for s in stretches])
    order = np.argsort(ids, kind="stable")
    first = np.ones(len(ids), bool)
    first[1:] = ids[order][1:] != ids[order][:-1]
    if not first.all():
        order = np.lexsort((*lists.T[::-1], ids))
    order = order[first]
    ids[order].tofile(folder / f"{number}.ids.sorted")
    lists[order].tofile(folder / f"{number}.lists.sorted")
    return len(order)


def _read(path: Path, stretch: _Stretch, dtype: str, width: int) -> NDArray[np.int64]:
    item = np.dtype(dtype).itemsize * width
    count = (stretch.end - stretch.begin) * width
    return np.fromfile(path, dtype, count, offset=stretch.begin * item).reshape(-1, width)


def _allot(out: Path, count: int, width: int) -> None:
    """Files of the right size, with nothing in them."""
    for name, dtype, shape in ((IDS, np.int64, (count,)), (LABELS, np.int32, (count, width))):
        if count:
            np.lib.format.open_memmap(_partial(out, name), "w+", dtype, shape).flush()
        else:
            np.save(_partial(out, name), np.empty(shape, dtype), allow_pickle=False)


def _place(out: Path, folder: Path, begins: Mapping[int, int], width: int) -> None:
    """Copy sorted ranges to where they begin in the map."""
    for number, begin in begins.items():
        ids = np.fromfile(folder / f"{number}.ids.sorted", "<i8")
        lists = np.fromfile(folder / f"{number}.lists.sorted", "<i4").reshape(-1, width)
        for name, values in ((IDS, ids), (LABELS, lists)):
            whole = np.lib.format.open_memmap(_partial(out, name), "r+")
            whole[begin : begin + len(values)] = values
            whole.flush()


def _finish(out: Path, folder: Path) -> None:
    """Under their names at once; `ids.npy` comes last."""
    for name in (LABELS, IDS):
        with _partial(out, name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(_partial(out, name), out / name)
        sync_folder(out)
    shutil.rmtree(folder)


def _partial(out: Path, name: str) -> Path:
    return out / f"partial-{name}"
