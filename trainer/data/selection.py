"""Which samples of shards are used, and how often: a folder beside the data, and no copy of it.

    selection.json       of every shard its index's digest and the samples it gives an epoch
    <shard>.keep.npy     [rows] float16, the share of epochs that hold the row; 0 is never, 1 always

A shard's file appears whole, by one rename. Rows are those of the shard's index, whose digest is
compared, so that a selection of other data is refused and not joined by chance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from trainer.config import Frozen
from trainer.data.shards import ShardSet
from trainer.errors import DataError
from trainer.hashing import key_of, permutation, uniform_of

HEADER = "selection.json"
SUFFIX = ".keep.npy"
_BISECTIONS = 100


class SelectedShard(Frozen):
    """What a selection has of one shard."""

    source: str
    """Digest of the shard's index."""
    rows: int = Field(ge=0)
    """Samples of the shard."""
    kept: int = Field(ge=0)
    """Samples that an epoch holds."""


class SelectionHeader(Frozen):
    """selection.json."""

    format: str = "protoscale-selection-1"
    about: dict[str, object]
    """How it was made."""
    shards: dict[str, SelectedShard]
    """By name, behind the set's where it has one."""


class Selection:
    """The selected rows of every shard of a run's data, epoch by epoch.

    A row with share 1 is in every epoch. Those between are drawn anew for each: as many of a shard
    as its shares sum to, each row with its own probability. The sum is rounded, so that the total
    over all shards is right; of a shard whose shares sum to under a half none may be drawn ever.
    A pure function of (seed, shard's name, epoch).
    """

    def __init__(self, folder: Path, names: list[str], kept: list[int], *, seed: int) -> None:
        self.folder, self.names, self.kept, self.seed = folder, names, kept, seed
        self.digest = hashlib.sha256((folder / HEADER).read_bytes()).hexdigest()

    @classmethod
    def open(cls, folder: Path, shards: ShardSet, *, seed: int) -> Selection:
        """DataError where the folder selects from other shards than these."""
        header = read_selection(folder)
        for name, digest in zip(shards.names, shards.digests, strict=True):
            entry = header.shards.get(name)
            if entry is None or entry.source != digest:
                what = "knows no shard" if entry is None else "was made of another"
                raise DataError(
                    f"{folder} {what} {name}; make it of the run's shards with tools/reduce.py, "
                    "or drop data.select"
                )
        kept = [header.shards[name].kept for name in shards.names]
        if not sum(kept):
            raise DataError(f"{folder} selects none of the {len(shards)} samples; select more")
        return cls(folder, shards.names, kept, seed=seed)

    def rows(self, shard: int, epoch: int) -> NDArray[np.int64]:
        """The rows of a shard in an epoch, ascending."""
        shares = read_shares(self.folder, self.names[shard])
        always, between = (shares >= 1).nonzero()[0], ((shares > 0) & (shares < 1)).nonzero()[0]
        if not (rest := self.kept[shard] - len(always)):
            return always
        key = key_of(self.seed, "select", self.names[shard], epoch)
        order = between[permutation(len(between), key).numpy()]
        drawn = order[systematic(shares[order], rest, uniform_of(0, key))]
        return np.sort(np.concatenate([always, drawn]))


def read_selection(folder: Path) -> SelectionHeader:
    try:
        return SelectionHeader.model_validate_json((folder / HEADER).read_bytes())
    except OSError as error:
        raise DataError(
            f"{folder} holds no selection ({error.strerror}); make one with tools/reduce.py"
        ) from None
    except ValidationError as error:
        raise DataError(f"{folder / HEADER} is damaged: {error.errors()[0]['msg']}") from None


def read_shares(folder: Path, name: str) -> Float64[np.ndarray, " rows"]:
    """The share of epochs of each row of a shard."""
    path = folder / f"{name}{SUFFIX}"
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float64)
    except Exception as error:  # its header is parsed as Python, which complains in many ways
        raise DataError(f"{path} can't be read ({error}); run tools/reduce.py again") from None


def kept_by_shard(sums: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers for each shard whose sum is that of all shares, rounded.

    What is cut off one shard counts for the next, in the order of names.
    """
    total, found = 0.0, {}
    for name in sorted(sums):
        found[name] = math.floor(total + sums[name] + 0.5) - math.floor(total + 0.5)
        total += sums[name]
    return found


def systematic(
    shares: Float[np.ndarray, " n"], count: int, start: float
) -> Int64[np.ndarray, " count"]:
    """`count` different places, each with its share as probability over starts in [0, 1).

    Shares are first scaled to sum to `count`, none above 1. Madow, "On the theory of systematic
    sampling", 1949.
    """
    ends = np.cumsum(scaled_shares(shares, count))
    ends *= count / ends[-1] if count else 1.0
    marks = np.arange(count) + start
    found: NDArray[np.int64] = np.searchsorted(ends, marks, side="right")
    return np.minimum(found, len(shares) - 1)


def scaled_shares(shares: Float[np.ndarray, " n"], total: float | int) -> Float64[np.ndarray, " n"]:
    """min(1, c * share) with the c whose sum is `total`; zeros stay zero."""
    most = np.count_nonzero(shares)
    if total >= most:
        return (shares > 0).astype(np.float64)
    low, high = 0.0, 1.0
    while np.minimum(1.0, high * shares).sum() < total:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = np.minimum(1.0, middle * shares).sum() >= total
        low, high = (low, middle) if enough else (middle, high)
    return np.asarray(np.minimum(1.0, high * shares), np.float64)


def write_shares(folder: Path, name: str, shares: Float[np.ndarray, " rows"]) -> None:
    """All of a shard's file or nothing of it."""
    path = folder / f"{name}{SUFFIX}"
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, np.asarray(shares, np.float16))
    partial.replace(path)


def write_selection(
    folder: Path,
    shards: ShardSet,
    shares: Mapping[str, NDArray[np.float64]],
    about: dict[str, object],
) -> None:
    """A whole selection of data that is small."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in shares.items():
        write_shares(folder, name, values)
    finish_selection(folder, shards, about)


def finish_selection(folder: Path, shards: ShardSet, about: dict[str, object]) -> SelectionHeader:
    """Write the header, once every shard's file is there."""
    kept = kept_by_shard({name: float(read_shares(folder, name).sum()) for name in shards.names})
    header = SelectionHeader(
        about=about,
        shards={
            name: SelectedShard(source=digest, rows=rows, kept=kept[name])
            for name, digest, rows in zip(shards.names, shards.digests, shards.sizes, strict=True)
        },
    )
    partial = folder / f"{HEADER}.partial"
    partial.write_text(header.model_dump_json(indent=1) + "\n")
    partial.replace(folder / HEADER)
    return header
