"""Cluster labels joined by sample id, never by position."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import DataError

UNKNOWN = -1
IDS, LABELS = "ids.npy", "labels.npy"
_CHECKED_ROWS = 1 << 20
_GATHERED_AT_ONCE = 1 << 22


class ClusterLabels:
    """A map from sample id to cluster ids: sorted arrays, looked up by binary search.

    A sample has one cluster or a list of them, the nearest first. 8 + 4 l or 8 + 8 l bytes a
    sample; a saved map is read through the page cache and may be larger than memory. An id given
    twice keeps its lowest label, so the order of the input does not matter.
    """

    def __init__(
        self, ids: Int64[Tensor, " n"], labels: Int[Tensor, " n"] | Int[Tensor, "n l"]
    ) -> None:
        """Entries with id -1 (rows that only fill up) or without a label are left out.

        Negative labels are none; those behind them move up.
        """
        table = _moved_up(labels[:, None] if labels.ndim == 1 else labels)
        known = (ids != -1) & (table[:, 0] >= 0)
        ids, table = _first_of_each(ids[known], table[known].long())
        small = table.numel() == 0 or int(table.max()) <= torch.iinfo(torch.int32).max
        self._ids = ids
        self._table = table.int() if small else table

    @classmethod
    def gather(
        cls,
        ids: Int64[Tensor, " n"],
        labels: Int[Tensor, " n"] | Int[Tensor, "n l"],
        comm: Comm,
    ) -> ClusterLabels:
        """The map of all ranks' samples together, on every rank.

        Range after range of the ids, which are hashes: what is gathered and sorted at a time is
        some millions of them, beside the map itself.
        """
        table = labels[:, None] if labels.ndim == 1 else labels
        total = int(comm.sum(torch.tensor([len(ids)], device=ids.device)))
        bits = max(-(-total // _GATHERED_AT_ONCE) - 1, 0).bit_length() + 1  # the sign is never set
        which = (ids >> (64 - bits)) + (1 << (bits - 1))
        order = torch.argsort(which, stable=True)
        counts = torch.bincount(which, minlength=1 << bits).tolist()
        parts = [
            cls(comm.gather_rows(ids[rows]), comm.gather_rows(table[rows].long()))
            for rows in order.split(counts)
        ]
        whole = cls.__new__(cls)
        whole._ids = torch.cat([part._ids for part in parts])
        whole._table = torch.cat([part._table for part in parts])
        return whole

    def __len__(self) -> int:
        return self._ids.shape[0]

    @property
    def ids(self) -> Int64[Tensor, " n"]:
        """Sorted, unique."""
        return self._ids

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """The nearest cluster, in the order of `ids`; int32 where it is enough."""
        return self._table[:, 0]

    @property
    def per_sample(self) -> int:
        """Clusters a sample has at most: the width of `top`."""
        return self._table.shape[1]

    @cached_property
    def num_clusters(self) -> int:
        """One more than the largest label."""
        return int(self._table.max()) + 1 if self._table.numel() else 0

    def of(self, sample_id: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The nearest cluster of every sample; -1 where the id is unknown."""
        return self.top(sample_id)[:, 0]

    def top(self, sample_id: Int64[Tensor, " b"]) -> Int64[Tensor, "b l"]:
        """All clusters of every sample, the nearest first.

        -1 fills up where a sample has fewer, and everywhere where its id is unknown.
        """
        if len(self) == 0:
            return sample_id.new_full((sample_id.shape[0], self.per_sample), UNKNOWN)
        wanted = sample_id.to(self._ids.device)
        place = torch.searchsorted(self._ids, wanted).clamp(max=len(self) - 1)
        known = (self._ids[place] == wanted)[:, None]
        return torch.where(known, self._table[place].long(), UNKNOWN).to(sample_id.device)

    def to(self, device: torch.device | str) -> ClusterLabels:
        """The same map with its arrays on another device."""
        moved = ClusterLabels.__new__(ClusterLabels)
        moved._ids, moved._table = self._ids.to(device), self._table.to(device)
        return moved

    def beside(self, device: torch.device, *, at_most: int = 1 << 30) -> ClusterLabels:
        """On a device where it takes so many bytes at most, and nothing waits to look it up; else
        as it is."""
        size = sum(values.numel() * values.element_size() for values in (self._ids, self._table))
        return self.to(device) if size <= at_most else self

    def save(self, folder: Path | str) -> None:
        """Write `ids.npy` and `labels.npy` into a folder (made if needed)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / IDS, self._ids.cpu().numpy(), allow_pickle=False)
        np.save(folder / LABELS, self._table.cpu().numpy(), allow_pickle=False)

    @classmethod
    def open(cls, folder: Path | str) -> ClusterLabels:
        """Map a saved folder into memory; its arrays are read once, in chunks that are not kept.

        DataError if a file is missing, cut short, or does not fit the other, if ids are not in
        ascending order (a search would find wrong rows), or if a label stands behind a -1.
        """
        ids, table = _mapped(Path(folder) / IDS), _mapped(Path(folder) / LABELS)
        table = table[:, None] if table.ndim == 1 else table
        if ids.ndim != 1 or table.ndim != 2 or len(ids) != len(table) or ids.dtype != torch.int64:
            raise DataError(
                f"{folder} holds {tuple(ids.shape)} ids of type {ids.dtype} for"
                f" {tuple(table.shape)} labels; write it again"
            )
        if table.is_floating_point() or table.dtype == torch.bool:
            raise DataError(f"{folder} holds labels of type {table.dtype}; write whole numbers")
        opened = cls.__new__(cls)
        opened._ids, opened._table = ids, table
        opened.num_clusters = _refuse_disorder(ids, table, folder) + 1
        return opened


def _moved_up(table: Tensor) -> Tensor:
    """Every row's labels in their order, and -1 behind them for those that are negative."""
    if table.shape[1] == 1:
        return table
    lacking = table < 0
    order = lacking.long().argsort(dim=1, stable=True)
    return table.masked_fill(lacking, UNKNOWN).gather(1, order)


def _refuse_disorder(ids: Tensor, table: Tensor, folder: Path | str) -> int:
    """The largest label, -1 without any; it is found in the one pass over all rows."""
    largest = UNKNOWN
    for start in range(0, len(ids), _CHECKED_ROWS):
        rows = slice(start, start + _CHECKED_ROWS)
        some = ids[rows.start : rows.stop + 1]
        if bool((some[1:] <= some[:-1]).any()):
            raise DataError(
                f"the ids in {folder} are not in ascending order, or one comes twice; write it "
                "with ClusterLabels(ids, labels).save(folder), which sorts them"
            )
        known = table[rows] >= 0
        if bool((known[:, 1:] & ~known[:, :-1]).any()):
            raise DataError(
                f"some sample in {folder} has a label behind a -1, which only fills rows up; write "
                "it with ClusterLabels(ids, labels).save(folder), which moves labels up"
            )
        largest = max(largest, int(table[rows].max()))
    return largest


def _first_of_each(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique ids, each with the first of its rows in lexicographic order."""
    order = torch.arange(ids.shape[0], device=ids.device)
    for column in [*reversed(table.unbind(1)), ids]:
        order = order[torch.argsort(column[order], stable=True)]
    ids, table = ids[order], table[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return ids[first], table[first]


def _mapped(path: Path) -> Tensor:
    try:
        # copy on write: torch wants a writable array, and the file is never changed
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # its header is parsed as Python, which complains in many ways
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"can't read the cluster labels in {path}: {said}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"can't read the cluster labels in {path}: it is no array but an archive")
    return torch.from_numpy(array)
