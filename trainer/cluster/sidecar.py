"""The clusters of every sample on disk: a file per shard, then one map by sample id.

    labels/<shard>.safetensors   ids [n], clusters [n, l] (-1 fills up), distances [n, l] (squared)
    ids.npy, labels.npy          the same clusters of all shards in order of id: `ClusterLabels`

A shard's file appears whole, by one rename, and says what it was made from; so a pass that was
killed goes on with the next shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from trainer.checkpoint.manifest import sync_folder, write_durably
from trainer.cluster.exact import ordered_sum
from trainer.cluster.grid import Grid
from trainer.cluster.kmeans import coarse_cells
from trainer.cluster.merge import Rows, write_map
from trainer.cluster.points import Points, stream
from trainer.cluster.problem import KMeansConfig, scan_precision
from trainer.cluster.ranks.together import rounds
from trainer.cluster.search.assign import prepare
from trainer.cluster.search.top import Nearest, nearest, nearest_two_level
from trainer.cluster.search.two_level import rows_at_once
from trainer.cluster.stored import StoredPoints
from trainer.comm import Comm, agreed
from trainer.errors import DataError

SIDECARS = "labels"
_ROWS_AT_ONCE = 1 << 16
_MERGED_AT_ONCE = 1 << 21


class Lookup(NamedTuple):
    """How the clusters of a block of points are found."""

    rows: int
    """Points of a rank to take at once."""
    find: Callable[[Tensor], Nearest]
    """Called with the same points by all scorers."""
    listed: int
    """Clusters on a list."""
    squares: Float64[Tensor, " k"]
    """Squared lengths of all centroids."""
    scorers: Comm


def lookup(
    centroids: Float[Tensor, "held d"],
    points: Points,
    config: KMeansConfig,
    comm: Comm,
    *,
    count: int,
    grid: Grid | None = None,
) -> Lookup:
    """The `count` nearest, exact or two-level as the clustering was. Every rank must call, with the
    centroids that it holds on the grid (None: all)."""
    grid = grid or Grid(config.clusters, Comm.solo(comm.device), comm)
    lengths = [ordered_sum(some.double().square()) for some in centroids.split(_ROWS_AT_ONCE)]
    rest = (count, grid.whole(torch.cat(lengths)), grid.scorers)
    if config.assignment == "two_level":
        cells = coarse_cells(centroids, config, comm)
        rows = max(config.row_block, rows_at_once(points.dim, centroids.device))
        return Lookup(rows, lambda block: nearest_two_level(block, cells, count=count), *rest)
    precision = scan_precision(points, config, comm, grid)
    table = prepare(centroids, precision=precision, scorers=grid.scorers)
    rows, width = -(-config.row_block // grid.scorers.world_size), config.column_block
    return Lookup(rows, lambda block: nearest(block, table, count=count, column_block=width), *rest)


def write_sidecars(
    points: StoredPoints,
    find: Lookup,
    folder: Path,
    *,
    stamp: str,
    min_cosine: float | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> int:
    """Write this rank's shards and return how many were not there before.

    `stamp` says what the labels depend on: a file with another one is written again. With
    `min_cosine` a cluster stays on the list only if the cosine between the sample and its centroid
    is at least that; the nearest always stays. The scorers write at the same pace; where one of
    them fails, the others stop early and without an error: ask all ranks afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spans = {
        name: slice(int(points.starts[number]), int(points.starts[number + 1]))
        for number, name in enumerate(points.shards)
        if _stamp_of(folder / f"{name}.safetensors") != stamp
    }
    written = 0
    with closing(_lists(points, list(spans.values()), find, min_cosine)) as lists:
        for name, span in spans.items():
            found = _of_shard(lists, span, find)
            if found is None:
                return written
            path = folder / f"{name}.safetensors"
            _write(path, points.ids(span.start, span.stop), found, stamp)
            written += 1
            report(f"{name}: clusters of {span.stop - span.start} samples")
        next(lists, None)  # goes on until the other scorers have no points left either
    return written


def merge_sidecars(folder: Path, names: Sequence[str], out: Path, comm: Comm) -> int:
    """Write the map of all shards; how many samples it has. Every rank calls.

    Each reads every W-th file, and none holds the ids of all. An id that is given twice keeps its
    lowest list.
    """
    width = comm.broadcast_json(
        agreed(comm, lambda: _width(folder, names) if comm.is_main else None)
    )
    return write_map(out, _rows(folder, names[comm.rank :: comm.world_size]), width, comm)


def _width(folder: Path, names: Sequence[str]) -> int:
    return _read(folder / f"{names[0]}.safetensors", "clusters")[0].shape[1] if names else 1


def _rows(folder: Path, names: Sequence[str]) -> Iterator[Rows]:
    """The shards' clusters, some of them at a time."""
    held: list[Rows] = []
    for name in names:
        ids, lists = _read(folder / f"{name}.safetensors", "ids", "clusters")
        if lists.max(initial=0) > np.iinfo(np.int32).max:
            raise DataError("labels of 2^31 clusters and more are not written")
        held.append(Rows(ids, lists.astype(np.int32)))
        if sum(len(rows.ids) for rows in held) >= _MERGED_AT_ONCE:
            yield Rows(*(np.concatenate(columns) for columns in zip(*held, strict=True)))
            held = []
    if held:
        yield Rows(*(np.concatenate(columns) for columns in zip(*held, strict=True)))


def _lists(
    points: Points, spans: Sequence[slice], find: Lookup, min_cosine: float | None
) -> Generator[Nearest, None, None]:
    """Of each block of this rank's points, in order of the spans."""
    device = find.squares.device
    blocks = chain.from_iterable(stream(points, find.rows, device, within=span) for span in spans)
    for step in rounds(blocks, points.dim, find.scorers):
        found = find.find(step.points)
        if step.place.stop > step.place.start:
            own = Nearest(found.ids[step.mine], found.distances[step.mine])
            if min_cosine is not None:
                own = _above(own, step.points[step.mine], find.squares, min_cosine)
            yield Nearest(own.ids.cpu(), own.distances.cpu())


def _of_shard(lists: Iterator[Nearest], span: slice, find: Lookup) -> Nearest | None:
    """The lists of a whole shard; None where another rank has failed before its end."""
    parts = [Nearest(torch.empty(0, find.listed, dtype=torch.int64), torch.empty(0, find.listed))]
    for _ in range(span.start, span.stop, find.rows):
        part = next(lists, None)
        if part is None:
            return None
        parts.append(part)
    return Nearest(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _above(found: Nearest, block: Tensor, lengths: Tensor, min_cosine: float) -> Nearest:
    """Lists cut where the cosine falls below; from |x - c|^2 and the squared lengths."""
    squares = ordered_sum(block.double().square())[:, None]
    others = lengths[found.ids.clamp(min=0)]
    cosine = (squares + others - found.distances.double()) / (2 * (squares * others).sqrt())
    out = ~(cosine >= min_cosine)
    out[:, 0] = False
    # lists stay without holes even where lengths differ
    order = out.long().argsort(dim=1, stable=True)
    ids = found.ids.masked_fill(out, -1).gather(1, order)
    return Nearest(ids, found.distances.masked_fill(out, torch.inf).gather(1, order))


def _write(path: Path, ids: Int64[Tensor, " n"], found: Nearest, stamp: str) -> None:
    tensors = {
        "ids": ids.cpu().contiguous(),
        "clusters": found.ids.contiguous(),
        "distances": found.distances.contiguous(),
    }
    partial = path.with_name(f"{path.name}.partial")
    write_durably(partial, save(tensors, metadata={"stamp": stamp}))
    os.replace(partial, path)
    sync_folder(path.parent)


def _stamp_of(path: Path) -> str | None:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("stamp")
    except (OSError, safetensors.SafetensorError):
        return None


def _read(path: Path, *names: str) -> list[NDArray[np.int64]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return [file.get_tensor(name) for name in names]
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"can't read the clusters in {path}: {error}") from error
