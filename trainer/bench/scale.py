"""What a rank pays to open, join and go on with a list of shards, at several lengths of it.

A catalogue of made-up shards (no image, and no index, which opening doesn't read) is written for
each length, and a process of its own opens it as a rank does. `growth` is the exponent of a power
of the number of shards, fitted to all lengths: 1 is proportional, 0 is constant.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.bench.growth import exponents
from trainer.bench.launch import launch
from trainer.data.catalogue import Entry, write_catalogue
from trainer.data.order import Order
from trainer.data.shards import ShardSet
from trainer.hashing import hash_bits, key_of

LAION_400M, LAION_2B = 41_408, 232_000
FIGURES = ("open_seconds", "ids_seconds", "go_on_seconds", "own_mib", "worker_mib")


def add_options(command: argparse.ArgumentParser) -> None:
    lengths = [LAION_400M // 8, LAION_400M // 4, LAION_400M // 2, LAION_400M]
    command.add_argument("--shards", type=int, nargs="+", default=lengths, help="lengths of lists")
    command.add_argument("--samples", type=int, default=9660, help="samples a shard")
    command.add_argument("--folder", type=Path, help="for the catalogues; a temporary one")


def measure_options(options: argparse.Namespace) -> list[dict[str, Any]]:
    return measure(options.shards, samples=options.samples, folder=options.folder)


def measure(
    lengths: list[int], *, samples: int, folder: Path | None = None
) -> list[dict[str, Any]]:
    """A row for each length, and one with the exponents where there are at least three.

    Seconds are of CPU: to open, to map and check the ids of all samples, to find the place of a run
    in its 1000th epoch. own_mib: memory of the process that is no mapped file, above what it had
    before; worker_mib: what is sent to each reader process; descriptors: open at the end.
    """
    rows = []
    for length in lengths:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            path = Path(own) / "made-up.catalogue"
            write_catalogue(str(path), _entries(length, samples))
            case = json.dumps(str(path))
            rows += launch("trainer.bench.scale", case, ranks=1, threads=1)
    growth = {"shards": "growth", **exponents(rows, "shards", FIGURES)}
    return [*rows, growth] if len(rows) > 2 else rows


def _entries(length: int, samples: int) -> Iterator[Entry]:
    for row in range(length):
        numbers = torch.arange(row * samples, (row + 1) * samples)
        ids = hash_bits(numbers, key_of("scale")).numpy().view(np.uint64) >> np.uint64(1)
        name = f"s3://bucket/laion/{row:06d}.tar"
        yield Entry(name, "", b"", f"{row:032x}", ids.astype(np.int64))


def _measured(path: str) -> dict[str, Any]:
    before, start = _own_bytes(), time.process_time()
    shards = ShardSet.open(path)
    opened = time.process_time()
    ids: NDArray[np.int64] = shards.ids
    some = np.searchsorted(np.sort(ids[:1000]), ids[shards.some(10_000) % len(ids)])
    joined = time.process_time()
    order = Order(shards.sizes, seed=0, window_shards=8)
    assert 0 <= order.at(1000 * len(shards) + len(shards) // 2)[1] < len(shards)
    assert len(some)
    return {
        "shards": len(shards.shards),
        "samples": len(shards),
        "open_seconds": opened - start,
        "ids_seconds": joined - opened,
        "go_on_seconds": time.process_time() - joined,
        "own_mib": (_own_bytes() - before) / 2**20,
        "worker_mib": len(ForkingPickler.dumps(shards)) / 2**20,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def _own_bytes() -> int:
    """Memory of this process that is no file."""
    status = Path("/proc/self/status").read_text().split("\n")
    line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps([_measured(json.loads(sys.argv[1]))]))
