"""A frozen teacher's vectors as they are clustered: chosen, averaged, centred, projected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from trainer.cluster.points import Points, Resident
from trainer.comm import Comm
from trainer.errors import ConfigError
from trainer.store import EmbeddingStore

ROWS = 8192
MOST_RESIDENT_BYTES = 1 << 30
"""Of this rank's points; more are read from disk in every pass."""


class Frame(NamedTuple):
    """x -> (x - mean) directions."""

    mean: Float64[Tensor, " dim"]
    directions: Float64[Tensor, "dim kept"] | None
    """All of the space where None."""


class TeacherPoints:
    """This rank's contiguous share of a store, one point a sample (of `corpus`, where given).

    A point is the mean of some of the sample's vectors (each scaled to length one, and so the
    mean), seen in a frame. Ids stay in memory, vectors on disk.
    """

    resident = False

    def __init__(
        self,
        store: EmbeddingStore,
        vectors: Sequence[int],
        comm: Comm,
        *,
        corpus: Int64[Tensor, " samples"] | None = None,
    ) -> None:
        self._store, self._vectors = store, list(vectors)
        first, last = comm.row_range(len(store))
        ids = torch.from_numpy(store.ids[first:last].copy())
        self._ids = ids if corpus is None else ids[torch.isin(ids, corpus)]
        self.frame: Frame | None = None

    @property
    def dim(self) -> int:
        if self.frame is None or self.frame.directions is None:
            return self._store.dim
        return self.frame.directions.shape[1]

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, first: int, last: int) -> Int64[Tensor, " n"]:
        return self._ids[first:last]

    def rows(self, first: int, last: int) -> Float32[Tensor, "n d"]:
        return self._seen(self._ids[first:last])

    def take(self, places: Int64[Tensor, " n"]) -> Float32[Tensor, "n d"]:
        return self._seen(self._ids[places.cpu()])

    def _seen(self, ids: Tensor) -> Tensor:
        # Float64, so that how many rows are read at once does not show in float32.
        rows = normalize(self._store.vectors(ids, self._vectors).double(), dim=-1).mean(dim=1)
        rows = normalize(rows, dim=-1)
        if self.frame is not None:
            rows = rows - self.frame.mean
            if self.frame.directions is not None:
                rows = rows @ self.frame.directions
        return rows.float()


def teacher_points(
    store: EmbeddingStore,
    vectors: Sequence[int],
    comm: Comm,
    *,
    centre: bool,
    pca: int | None,
    corpus: Int64[Tensor, " samples"] | None = None,
) -> Points:
    """The points of a store, centred and cut to `pca` principal components where asked for.

    One pass for the frame, with a float64 sum over ranks of dim x dim numbers at most; then in
    memory if there is room.
    """
    if pca is not None and not 0 < pca <= min(store.dim, len(store)):
        raise ConfigError(
            f"pca is {pca}, but {store.folder} has {len(store)} samples of {store.dim} numbers"
        )
    points = TeacherPoints(store, vectors, comm, corpus=corpus)
    if centre or pca is not None:
        points.frame = fit_frame(points, comm, kept=pca)
    if len(points) * points.dim * 4 > MOST_RESIDENT_BYTES:
        return points
    rows = [points.rows(at, min(at + ROWS, len(points))) for at in range(0, len(points), ROWS)]
    found = torch.cat([torch.empty(0, points.dim), *rows])
    return Resident(found.to(comm.device), points.ids(0, len(points)).to(comm.device))


def fit_frame(points: TeacherPoints, comm: Comm, *, kept: int | None) -> Frame:
    """The mean of all ranks' points and, where `kept` is given, their first components.

    As ProtoCLIP does with its text teacher (arXiv 2206.10996): centred, not whitened. A
    direction's sign is such that its largest entry is positive.
    """
    total = torch.zeros(points.dim, dtype=torch.float64)
    products = torch.zeros(points.dim, points.dim if kept else 0, dtype=torch.float64)
    for start in range(0, len(points), ROWS):
        rows = points.rows(start, min(start + ROWS, len(points))).double()
        total += rows.sum(0)
        if kept:
            products += rows.T @ rows
    count = torch.tensor(float(len(points)), dtype=torch.float64)
    count, total, products = (
        comm.sum(value.to(comm.device)).cpu() for value in (count, total, products)
    )
    mean = total / count.clamp_min(1)
    if kept is None:
        return Frame(mean, None)
    _, vectors = torch.linalg.eigh(products / count - mean.outer(mean))
    directions = vectors.flip(1)[:, :kept]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return Frame(mean, directions * largest.sign())
