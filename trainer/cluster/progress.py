"""What a clustering tells while it goes, and where it can go on from."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from trainer.cluster.problem import Facts
from trainer.stop import Check


class State(NamedTuple):
    """After an update: all that the rest of a run depends on."""

    facts: Facts
    centroids: Float[Tensor, "k d"]
    """Those that this rank holds; all of them where ranks form no grid."""
    objective: list[float]
    """Mean squared distance per point before each update that was made."""
    repaired: int


@runtime_checkable
class Observer(Protocol):
    """Is told how a clustering goes; every rank calls its own, at the same moments."""

    def scored(self, iteration: int, objective: float, moved: float | None) -> None:
        """A pass is done: mean squared distance per point after `iteration` updates, and the
        share of points that changed their cluster (None where that is not known)."""
        ...

    def updated(self, state: State) -> None:
        """There are centroids to go on from: the first ones, or those that have moved."""
        ...


class Silent:
    """Watches and says nothing."""

    def scored(self, iteration: int, objective: float, moved: float | None) -> None: ...

    def updated(self, state: State) -> None: ...


class Interruptible:
    """Lets a clustering be stopped after any of its passes."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def scored(self, iteration: int, objective: float, moved: float | None) -> None:
        self._check()

    def updated(self, state: State) -> None: ...
