"""What the cells of a study take: FLOPs, device-hours, and how much of them others have done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from trainer.long_work import counted
from trainer.plan.cards import Card
from trainer.plan.plan import Plan, planned
from trainer.scaling.study import Cell, Study, cells

_SHARED = ("steps=", "seed=", "workdir=", "data.train=", "optim.cooldown_steps=")
"""Overrides in which cells of one plan may differ."""


class Costed(NamedTuple):
    """A cell with what it takes."""

    cell: Cell
    flops: float
    """Of the model, on all devices, from the first step to the last."""
    hours: float
    """Of all devices together, for what is trained anew."""
    parameters: int
    anew: float = 1.0
    """Share of the steps that no cell of a smaller budget has taken on the way."""

    @property
    def flops_anew(self) -> float:
        return self.flops * self.anew


def costs(study: Study, *, card: Card, world_size: int, utilisation: float) -> list[Costed]:
    """Every cell's, cheapest first. Sizes that differ in steps, seed and data alone are planned
    once."""
    every = cells(study)
    found = [
        _cost(study, cell, card, world_size, utilisation, planner=_planner())
        for cell in counted(every, "planning", total=len(every), unit="trainings")
    ]
    shared = [_anew(each, found) for each in found]
    return sorted(shared, key=lambda each: (each.flops, each.cell.name))


@cache
def _planner() -> dict[tuple[object, ...], Plan]:
    return {}


def _cost(
    study: Study,
    cell: Cell,
    card: Card,
    world_size: int,
    utilisation: float,
    *,
    planner: dict[tuple[object, ...], Plan],
) -> Costed:
    own = tuple(text for text in cell.overrides if not text.startswith(_SHARED))
    key = (str(study.base), cell.recipe, cell.model, own, card, world_size, utilisation)
    if key not in planner:
        planner[key] = planned(
            cell.config(study), card=card, world_size=world_size, utilisation=utilisation
        )
    plan = planner[key]
    share = cell.steps / plan.config.steps
    return Costed(
        cell, plan.run_flops * share, plan.hours * share * world_size, plan.weights.learnt
    )


def _anew(each: Costed, found: Sequence[Costed]) -> Costed:
    """With the share of its steps that is not on the trunk already, where there is one."""
    trunk = each.cell.trunk
    if trunk is None:
        return each
    before = [
        other.cell.trunk.step
        for other in found
        if other.cell.chain == each.cell.chain
        and other.cell.trunk is not None
        and other.cell.trunk.step < trunk.step
    ]
    share = 1 - max(before, default=0) / each.cell.steps
    return each._replace(anew=share, hours=each.hours * share)
