"""How large the weights and gradients of each tower are, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.types import TowerName

TOWERS: tuple[TowerName, ...] = ("image", "text", "other")


class TowerNorms:
    """The optimizer's groups hold gradients in float32 just when it steps (stage 3 brings one piece
    after another), and a group belongs to one tower: so sums of squares are gathered there.
    """

    def __init__(self, comm: Comm, *, divided: bool) -> None:
        """`divided`: each rank holds its own values, and not all of them hold the same."""
        self._comm, self._divided = comm, divided
        self.begin()

    def begin(self) -> None:
        """Forget the last step."""
        self._gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A hook in front of the optimizer's step."""
        for group in optimizer.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    _add(self._gradients, group["tower"], values.grad)

    @torch.no_grad()
    def norms(
        self, weights: Iterable[tuple[TowerName, Tensor]], gradient_norm: float | Tensor
    ) -> dict[str, Tensor]:
        """`weight_norm/TOWER` of this rank's `weights`, and `gradient_norm/TOWER` of the last step;
        zero for a tower that is not there or not trained. Collective where values are divided.

        The optimizer sees clipped gradients. All towers are clipped by one factor, so the norm of
        the whole gradient before it, `gradient_norm`, gives back what each of them had.
        """
        squares: dict[str, Tensor] = {}
        for tower, values in weights:
            _add(squares, tower, values)
        zero = torch.zeros((), dtype=torch.float64)
        found = [sums.get(tower, zero) for sums in (squares, self._gradients) for tower in TOWERS]
        stacked = torch.stack([value.to(self._comm.device) for value in found])
        stacked = self._comm.sum(stacked) if self._divided else stacked
        of_weights, gradients = stacked.sqrt().split(len(TOWERS))
        clipped = gradients.square().sum().sqrt()
        gradients = gradients * gradient_norm / clipped.clamp_min(torch.finfo(torch.float64).tiny)
        names = [f"{kind}/{tower}" for kind in ("weight_norm", "gradient_norm") for tower in TOWERS]
        return dict(zip(names, [*of_weights, *gradients], strict=True))


def _add(sums: dict[str, Tensor], tower: str, values: Tensor) -> None:
    squares = torch.linalg.vector_norm(values, dtype=torch.float32).double().square()
    sums[tower] = sums[tower] + squares if tower in sums else squares
