"""The centroids of a clustering on disk: a table that any grid of ranks reads and writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor

from trainer.checkpoint.manifest import sync_folder, write_durably
from trainer.checkpoint.restored import Restored
from trainer.cluster.grid import Grid
from trainer.cluster.kmeans import State
from trainer.cluster.problem import Facts
from trainer.comm import Comm, agreed
from trainer.errors import CheckpointError, ConfigError

_ROWS_AT_ONCE = 1 << 16


def state_on(restored: Restored, grid: Grid, comm: Comm) -> State:
    """Where a run goes on: what was saved, with the rows that this rank holds."""
    told: Mapping[str, Any] = restored.state
    return State(
        Facts(*told["facts"]),
        _held_part(restored, grid).to(comm.device),
        list(told["objective"]),
        int(told["repaired"]),
    )


def _held_part(restored: Restored, grid: Grid) -> Float[Tensor, "held d"]:
    """The rows that this rank holds; those that were saved are read one share at a time."""
    parts: dict[int, Tensor] = {}
    for name, rows in restored.tensors("centroids"):
        first = int(name)
        begin, end = max(grid.held.start - first, 0), max(grid.held.stop - first, 0)
        parts[first] = rows[begin:end].clone()
    return torch.cat([parts[first] for first in sorted(parts)])


def warm_start(path: Path, grid: Grid, dim: int) -> Float[Tensor, "held d"]:
    """This rank's rows of a file with a tensor `centroids`. ConfigError where it does not fit."""
    wanted = [grid.clusters, dim]
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            table = file.get_slice("centroids")
            if table.get_shape() == wanted:
                held: Tensor = table[grid.held]
                return held.float()
            found = tuple(table.get_shape())
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"can't start from {path}: {error}") from error
    raise ConfigError(f"the centroids in {path} are {found} and must be {tuple(wanted)}")


def write_centroids(
    path: Path, held: Tensor, counts: Tensor, figures: dict[str, Any], grid: Grid, comm: Comm
) -> None:
    """By the ranks of the grid's first row, each its slice; every rank calls.

    No rank ever has the whole table. The file says a digest of its rows, so that nobody reads it
    to know which it is.
    """
    partial = path.with_name(f"{path.name}.partial")
    writes = comm.rank < grid.scorers.world_size
    rows = held.float().cpu().contiguous() if writes else held[:0].float().cpu()
    told = comm.gather_json(rows_digest(rows, first=grid.held.start))
    digest = f"{sum(int(part, 16) for part in told) % (1 << 128):032x}"
    shape, data = (
        (grid.clusters, held.shape[1]),
        counts.cpu().long().numpy().astype("<i8").tobytes(),
    )
    head = _header(shape, {"figures": json.dumps(figures), "rows_digest": digest})
    begin = len(head) + len(data) + 4 * shape[1] * grid.held.start

    def start() -> None:
        with partial.open("wb") as file:
            file.write(head + data)
            file.truncate(len(head) + len(data) + 4 * shape[0] * shape[1])

    def fill() -> None:
        with partial.open("r+b") as file:
            file.seek(begin)
            file.write(rows.numpy().astype("<f4", copy=False).data)
            file.flush()
            os.fsync(file.fileno())

    def finish() -> None:
        os.replace(partial, path)
        sync_folder(path.parent)

    agreed(comm, lambda: start() if comm.is_main else None)
    agreed(comm, lambda: fill() if writes else None)
    agreed(comm, lambda: finish() if comm.is_main else None)


def rows_digest(rows: Float[Tensor, "n d"], *, first: int) -> str:
    """Of rows that are numbered from `first`: a sum, so that parts of a table add up to its own."""
    total = 0
    for number, row in enumerate(rows.numpy().astype("<f4", copy=False), start=first):
        key = number.to_bytes(8, "little")
        total += int.from_bytes(
            hashlib.blake2b(row.data, digest_size=16, key=key).digest(), "little"
        )
    return f"{total % (1 << 128):032x}"


def _header(shape: tuple[int, int], metadata: dict[str, str]) -> bytes:
    """Of a safetensors file with `counts` and then `centroids`."""
    end = 8 * shape[0]
    told = {
        "__metadata__": metadata,
        "counts": {"dtype": "I64", "shape": shape[:1], "data_offsets": [0, end]},
        "centroids": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [end, end + 4 * shape[0] * shape[1]],
        },
    }
    text = json.dumps(told).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def read_centroids(path: Path, grid: Grid, comm: Comm) -> tuple[Tensor, dict[str, Any]]:
    """The rows that this rank holds, and the figures."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            figures = json.loads(file.metadata()["figures"])
            held: Tensor = file.get_slice("centroids")[grid.held]
            return held.to(comm.device), figures
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"can't read {path}: {error}; delete it and start again") from error


def digest_of(path: Path) -> str:
    """Of the centroids: as the file says, or SHA-256 where an earlier version wrote it."""
    digest = hashlib.sha256()
    with safetensors.safe_open(path, framework="pt") as file:
        if told := (file.metadata() or {}).get("rows_digest"):
            return str(told)
        table = file.get_slice("centroids")
        for first in range(0, table.get_shape()[0], _ROWS_AT_ONCE):
            digest.update(table[first : first + _ROWS_AT_ONCE].numpy().tobytes())
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    write_durably(partial, data)
    os.replace(partial, path)
