"""Stored features with classes: what is tuned on, and what is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import DataError
from trainer.evals.labels import class_of
from trainer.evals.samples import Record, values_of
from trainer.store import EmbeddingStore

UNKNOWN = -1
BLOCK = 4096
"""Rows that are read from a store at once."""


class LabelledStore(NamedTuple):
    """A store whose samples have classes. Vectors stay on disk; 16 bytes a sample are held."""

    store: EmbeddingStore
    ids: Int64[Tensor, " n"]
    labels: Int64[Tensor, " n"]
    """Of `names`; UNKNOWN for a class that is not among them."""
    names: tuple[str, ...]
    without: int = 0
    """Samples of the shards that have no vector in the store."""

    @property
    def num_views(self) -> int:
        """Augmented vectors of a sample, besides the clean one."""
        return self.store.num_vectors - 1

    def clean(self, rows: Int64[Tensor, " b"]) -> Float32[Tensor, "b dim"]:
        return self._finite(self.store.vectors(self.ids[rows], [0])[:, 0])

    def view(
        self, rows: Int64[Tensor, " b"], which: Int64[Tensor, " b"]
    ) -> Float32[Tensor, "b dim"]:
        """An augmented vector of each row, by its number from 1 on."""
        return self._finite(self.store.vectors(self.ids[rows], which[:, None])[:, 0])

    def _finite(self, rows: Float32[Tensor, "b dim"]) -> Float32[Tensor, "b dim"]:
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(dim=1).sum())
            raise DataError(
                f"{bad} of {len(rows)} vectors read from {self.store.folder} are not finite; write "
                "the store anew (tools/embed.py --verify looks at all of it)"
            )
        return rows


def open_labelled(
    folder: Path,
    spec: str,
    target: str,
    comm: Comm,
    *,
    names: Sequence[str] | None = None,
) -> LabelledStore:
    """The samples of a store that have a class: the json key `target` of the shards `spec`.

    Classes are numbered as in `names`, or sorted where None. Ranks share the reading; all get all
    labels. DataError where no sample of the store has a class.
    """
    store, shards = EmbeddingStore.open(folder), ShardSet.open(spec)
    inside = np.flatnonzero(np.isin(shards.ids, store.ids))
    own = [
        (int(shards.ids[index]), _class(shards, int(index), target))
        for index in inside[comm.rank :: comm.world_size]
    ]
    found = dict(chain.from_iterable(comm.gather_json([pair for pair in own if pair[1]])))
    if not found:
        raise DataError(
            f"no sample of {spec} is in {folder} and has a class under {target!r}; name the shards "
            "that the store was made of, and a key of their json"
        )
    known = tuple(names) if names is not None else tuple(sorted(set(found.values())))
    number = {name: place for place, name in enumerate(known)}
    ids = [int(sample) for sample in shards.ids[inside] if int(sample) in found]
    labels = [number.get(found[sample], UNKNOWN) for sample in ids]
    without = len(shards) - len(inside)
    return LabelledStore(store, torch.tensor(ids), torch.tensor(labels), known, without)


def _class(shards: ShardSet, index: int, target: str) -> str | None:
    try:
        raw = shards.read(index)
        return class_of(Record(raw.sample_id, values_of(raw.fields)), target)
    except (BadSample, DamagedSample):
        return None


class Standard(NamedTuple):
    """Takes the training features' mean off and divides by their deviation, feature by feature."""

    mean: Float32[Tensor, " dim"]
    deviation: Float32[Tensor, " dim"]

    @classmethod
    def of(cls, data: LabelledStore, comm: Comm) -> Standard:
        """From the clean features, summed in float64; the same for any number of ranks."""
        total = torch.zeros(2, data.store.dim, dtype=torch.float64)
        for rows in own_blocks(len(data.ids), comm):
            clean = data.clean(rows).double()
            total += torch.stack([clean.sum(dim=0), clean.square().sum(dim=0)])
        first, second = (comm.sum(total.to(comm.device)) / len(data.ids)).unbind()
        deviation = (second - first.square()).clamp(min=0).sqrt()
        # A constant feature stays zero and does not become noise of size one.
        floor = 1e-6 * deviation.max().clamp(min=1e-30)
        return cls(first.float(), deviation.clamp(min=floor).float())

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows.to(self.mean.device) - self.mean) / self.deviation


def own_blocks(count: int, comm: Comm) -> tuple[Int64[Tensor, " b"], ...]:
    """This rank's contiguous share of `count` rows, some thousands at a time."""
    first, last = comm.row_range(count)
    return torch.arange(first, last).split(BLOCK) if last > first else ()
