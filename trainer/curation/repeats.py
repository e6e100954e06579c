"""Which samples of a scan look like one of a lower id, over all shards.

OUT/repeats/<shard>.npy    [rows] bool; OUT/repeats.json says how near, and how many there are

Hashes go through memory in parts, so it holds no more than `rows_at_once` of them however many
there are. A sample repeats whatever the number of parts and processes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.comm import Comm, agreed
from trainer.curation.perceptual import band_values, repeats_in_band
from trainer.curation.rows import SUFFIX, open_rows
from trainer.curation.scan import ROWS
from trainer.data.shards import ShardSet
from trainer.errors import DataError
from trainer.long_work import counted
from trainer.store.header import write_whole

REPEATS, FIGURES = "repeats", "repeats.json"
ROWS_AT_ONCE = 1 << 26
"""16 bytes each."""


def find_repeats(
    shards: ShardSet,
    out: Path,
    comm: Comm,
    *,
    most_bits: int,
    rows_at_once: int = ROWS_AT_ONCE,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Write which samples differ from an earlier one's picture in at most so many bits."""
    folder = out / REPEATS
    folder.mkdir(parents=True, exist_ok=True)
    parts = -(-len(shards) // rows_at_once)
    jobs = [(band, part) for band in range(most_bits + 1) for part in range(parts)]
    own = jobs[comm.rank :: comm.world_size]

    def search() -> None:
        for band, part in counted(own, "comparing pictures", total=len(own), unit="parts"):
            ids, hashes = _members(shards, out, band, part, parts, most_bits)
            late = np.sort(ids[repeats_in_band(hashes, ids, band, most_bits)])
            _save(folder / f"part-{band}-{part}.npy", late)

    agreed(comm, search)
    found = [0]

    def mark() -> None:
        late = [np.load(folder / f"part-{b}-{p}.npy", mmap_mode="r") for b, p in jobs]
        for row in range(comm.rank, len(shards.shards), comm.world_size):
            name = shards.names[row]
            ids = open_rows(out / ROWS / f"{name}{SUFFIX}", ("ids",))[0].ids
            repeats = np.zeros(len(ids), bool)
            for part in late:
                repeats |= _among(ids, part)
            _save(folder / f"{name}.npy", repeats)
            found[0] += int(repeats.sum())

    agreed(comm, mark)
    figures = {"most_bits": most_bits, "repeats": sum(comm.gather_json(found[0]))}
    agreed(comm, lambda: _finish(out, figures, folder) if comm.is_main else None)
    say(f"{figures['repeats']} samples look like an earlier one (at most {most_bits} of 64 bits)")
    return figures


def read_repeats(out: Path, name: str) -> NDArray[np.bool_]:
    """Of each row of a shard; DataError where the scan did not look for any."""
    if not (out / FIGURES).exists():
        raise DataError(f"{out} holds no near-duplicates; scan with --near-duplicates BITS")
    return np.asarray(np.load(out / REPEATS / f"{name}.npy", allow_pickle=False), bool)


def _members(
    shards: ShardSet, out: Path, band: int, part: int, parts: int, most_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and hashes of the usable samples whose band's value falls to a part."""
    ids, hashes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for name in shards.names:
        rows, _ = open_rows(out / ROWS / f"{name}{SUFFIX}", ("ids", "status", "picture"))
        mine = rows.usable & (band_values(rows.picture, band, most_bits) % parts == part)
        ids.append(rows.ids[mine])
        hashes.append(rows.picture[mine])
    return np.concatenate(ids), np.concatenate(hashes)


def _among(ids: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(found):
        return np.zeros(len(ids), bool)
    places = np.minimum(np.searchsorted(found, ids), len(found) - 1)
    return np.asarray(found[places] == ids)


def _save(path: Path, values: NDArray[np.int64] | NDArray[np.bool_]) -> None:
    data = io.BytesIO()
    np.save(data, values)
    write_whole(path, data.getvalue())


def _finish(out: Path, figures: dict[str, int], folder: Path) -> None:
    for part in folder.glob("part-*.npy"):
        part.unlink()
    write_whole(out / FIGURES, (json.dumps(figures) + "\n").encode())
