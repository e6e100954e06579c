"""What of a parameter goes on in a changed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """The rows, columns and so on of an old parameter that a new one consists of."""

    name: str
    """Of the old parameter."""
    places: Mapping[int, Tensor] = {}
    """Places that stay along a dimension, in their new order; all where a dimension is missing."""

    def of(self, whole: Tensor) -> Tensor:
        """The kept part of the old parameter's weight, or of one of its moments."""
        for dim, places in self.places.items():
            whole = whole.index_select(dim, places.to(whole.device))
        return whole
