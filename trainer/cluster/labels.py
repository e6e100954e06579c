"""Cluster labels joined by sample id, never by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.errors import DataError

UNKNOWN = -1


class ClusterLabels:
    """A map from sample id to cluster id: sorted arrays, looked up by binary search.

    12 or 16 bytes a sample; a saved map is read through the page cache and may be larger than
    memory. An id given twice keeps its lowest label, so the order of the input does not matter.
    """

    def __init__(self, ids: Int64[Tensor, " n"], labels: Int[Tensor, " n"]) -> None:
        """Entries with id -1 (rows that only fill up) or a negative label are left out."""
        known = (ids != -1) & (labels >= 0)
        ids, labels = _first_of_each(ids[known], labels[known].long())
        small = labels.numel() == 0 or int(labels.max()) <= torch.iinfo(torch.int32).max
        self._ids = ids
        self._labels = labels.int() if small else labels

    @classmethod
    def gather(
        cls, ids: Int64[Tensor, " n"], labels: Int[Tensor, " n"], comm: Comm
    ) -> ClusterLabels:
        """The map of all ranks' samples together, on every rank."""
        return cls(comm.gather_rows(ids), comm.gather_rows(labels.long()))

    def __len__(self) -> int:
        return self._ids.shape[0]

    @property
    def ids(self) -> Int64[Tensor, " n"]:
        """Sorted, unique."""
        return self._ids

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """In the order of `ids`; int32 where it is enough."""
        return self._labels

    def of(self, sample_id: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """The label of every sample; -1 where the id is unknown."""
        if len(self) == 0:
            return torch.full_like(sample_id, UNKNOWN)
        wanted = sample_id.to(self._ids.device)
        place = torch.searchsorted(self._ids, wanted).clamp(max=len(self) - 1)
        found = torch.where(self._ids[place] == wanted, self._labels[place].long(), UNKNOWN)
        return found.to(sample_id.device)

    def to(self, device: torch.device | str) -> ClusterLabels:
        """The same map with its arrays on another device."""
        moved = ClusterLabels.__new__(ClusterLabels)
        moved._ids, moved._labels = self._ids.to(device), self._labels.to(device)
        return moved

    def save(self, folder: Path | str) -> None:
        """Write `ids.npy` and `labels.npy` into a folder (made if needed)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "ids.npy", self._ids.cpu().numpy(), allow_pickle=False)
        np.save(folder / "labels.npy", self._labels.cpu().numpy(), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path | str) -> ClusterLabels:
        """Map a saved folder into memory; nothing is read before it is looked up.

        DataError if a file is missing, cut short, or does not fit the other.
        """
        ids, labels = _mapped(Path(folder) / "ids.npy"), _mapped(Path(folder) / "labels.npy")
        if ids.shape != labels.shape or ids.ndim != 1 or ids.dtype != torch.int64:
            raise DataError(
                f"{folder} holds {tuple(ids.shape)} ids of type {ids.dtype} for"
                f" {tuple(labels.shape)} labels; write it again"
            )
        loaded = cls.__new__(cls)
        loaded._ids, loaded._labels = ids, labels
        return loaded


def _first_of_each(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted unique ids, each with its lowest label."""
    order = torch.argsort(labels, stable=True)
    order = order[torch.argsort(ids[order], stable=True)]
    ids, labels = ids[order], labels[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return ids[first], labels[first]


def _mapped(path: Path) -> Tensor:
    try:
        # copy on write: torch wants a writable array, and the file is never changed
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"can't read the cluster labels in {path}: {error}") from error
    return torch.from_numpy(array)
