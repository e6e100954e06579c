"""Values beside an engine's trained weights, as an average of them over the steps."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.engine.masters import Piece


class WeightCopy:
    """A copy of the float32 weights, of which each rank holds what it holds of the weights.

    `Engine.rebuild` cuts it as it cuts the weights, and shows it the new ones.
    """

    def __init__(self, weights: Mapping[str, Piece]) -> None:
        self.begin_at(weights)

    def begin_at(self, weights: Mapping[str, Piece]) -> None:
        """Follow these weights, from their values as they are now."""
        self.weights = weights
        """The engine's own pieces, by parameter."""
        self.values = {n: Piece(p.start, p.values.clone()) for n, p in weights.items()}
