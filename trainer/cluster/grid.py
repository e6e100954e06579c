"""Which rows of the centroids a rank holds, scores, updates and saves.

Ranks form a grid. Those of one row of it, the scorers, take the same points, and each scores them
against its own slice of the centroids; those of one column hold the same slice, score other points,
and add up their sums. With one scorer every rank holds all centroids; with all ranks in one row
every centroid is on one rank alone. Labels do not depend on it: the scorers agree on the nearest.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trainer.comm import Comm


class Grid(NamedTuple):
    """This rank's place."""

    clusters: int
    """K, over all ranks."""
    scorers: Comm
    """The ranks that score the same points: neighbours, each with a slice of its own."""
    copies: Comm
    """The ranks that hold the same slice."""

    @property
    def held(self) -> slice:
        """The rows that this rank scores."""
        return slice(*self.scorers.row_range(self.clusters))

    @property
    def owned(self) -> slice:
        """Its share of these: the rows that this rank updates and saves."""
        first, last = self.copies.row_range(self.held.stop - self.held.start)
        return slice(self.held.start + first, self.held.start + last)

    @property
    def owned_here(self) -> slice:
        """`owned` as places among the rows held."""
        return slice(self.owned.start - self.held.start, self.owned.stop - self.held.start)

    @property
    def padded(self) -> int:
        """The number of rows held, filled up so that the copies' shares are of one size."""
        share = -(-max(self.held.stop - self.held.start, 1) // self.copies.world_size)
        return int(share * self.copies.world_size)

    def whole(self, held: Tensor) -> Tensor:
        """[k, ...] on every rank, of the rows that each holds."""
        return self.scorers.gather_rows(held)

    def part(self, whole: Tensor) -> Tensor:
        """The rows that this rank holds, in memory of their own."""
        return whole if self.scorers.world_size == 1 else whole[self.held].clone()
