"""Which parameter gets which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import nn

from trainer.config import OptimConfig
from trainer.types import TowerName


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    depth_of: Callable[[str], tuple[TowerName, int]],
) -> list[dict[str, Any]]:
    """Groups for AdamW: per tower and depth, with and without weight decay.

    `depth_of(name)` is the tower and the number of layers above a parameter; its base learning
    rate is the tower's times `layer_decay ** depth`. Vectors and scalars (norms, biases, scales)
    are not decayed, nor are the prototype heads (arXiv 2206.10996). Frozen parameters are left out.
    """
    towers = {"image": config.image_learning_rate, "text": config.text_learning_rate, "other": None}
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        tower, depth = depth_of(name)
        rate = (towers[tower] or config.learning_rate) * config.layer_decay**depth
        decays = parameter.dim() >= 2 and tower != "other"
        decay = config.weight_decay if decays else 0.0
        shared = {"tower": tower, "lr": rate, "base_lr": rate, "weight_decay": decay}
        group = groups.setdefault((tower, rate, decay), {"params": [], **shared})
        group["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(
    groups: Iterable[dict[str, Any]], factor: float, locked: Collection[TowerName] = ()
) -> None:
    """Every group's learning rate becomes its base rate times the schedule's factor.

    A locked tower's is 0, so that neither its momentum nor its weight decay moves it.
    """
    for group in groups:
        group["lr"] = 0.0 if group["tower"] in locked else group["base_lr"] * factor
