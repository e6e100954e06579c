"""The centroids of a clustering on disk: a table that any grid of ranks reads and writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from trainer.checkpoint.manifest import write_durably
from trainer.checkpoint.restored import Restored
from trainer.cluster.grid import Grid
from trainer.cluster.kmeans import State
from trainer.cluster.problem import Facts
from trainer.comm import Comm
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


def on_main(held: Tensor, grid: Grid, comm: Comm) -> Float[Tensor, "k d"]:
    """All centroids in the main rank's host memory, sent slice by slice; what others get is of no
    use."""
    if grid.scorers.world_size == 1:
        return held.cpu()
    whole = torch.empty(grid.clusters if comm.is_main else 0, held.shape[1])
    for rank in range(grid.scorers.world_size):  # the first row of the grid
        first, last = replace(grid.scorers, rank=rank).row_range(grid.clusters)
        if last > first:
            part = held if comm.rank == rank else held.new_empty(last - first, held.shape[1])
            part = comm.broadcast(part, source=rank)
            if comm.is_main:
                whole[first:last] = part.cpu()
    return whole


def write_centroids(
    path: Path, whole: Tensor, counts: Tensor, figures: dict[str, Any], comm: Comm
) -> None:
    """By the main rank, which has the whole table."""
    if comm.is_main:
        tensors = {"centroids": whole, "counts": counts.cpu()}
        write_whole(path, save(tensors, metadata={"figures": json.dumps(figures)}))


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
    """SHA-256 of the centroids, read a part at a time."""
    digest = hashlib.sha256()
    with safetensors.safe_open(path, framework="pt") as file:
        table = file.get_slice("centroids")
        for first in range(0, table.get_shape()[0], _ROWS_AT_ONCE):
            digest.update(table[first : first + _ROWS_AT_ONCE].numpy().tobytes())
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    write_durably(partial, data)
    os.replace(partial, path)
