"""Gates that learn which units of two towers to keep, beside the engine (TinyCLIP, section 3.2).

They are few numbers in float32 that every rank holds whole. Their draws are functions of the seed
and of how many steps they have learned, so that all ranks, and all micro-batches of a step, have
the same ones. The wanted sparsity pulls at them by Lagrange multipliers, which learn by ascent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from trainer.comm import Comm
from trainer.config import Fraction, Frozen, PositiveInt
from trainer.hashing import key_of
from trainer.losses.sparse_gates import (
    EDGE,
    LARGEST,
    Gates,
    Multipliers,
    Sides,
    drawn,
    is_open,
    kept_weights,
    lagrangian,
    open_probability,
    wanted_sparsity,
)
from trainer.models.gated import GatedTower
from trainer.recipe import every_nth
from trainer.types import NamedTensors


class StageConfig(Frozen):
    """One time that a model shrinks."""

    steps: PositiveInt
    """Steps in which the gates learn; behind the last one the closed units are cut away."""
    target: float = Field(gt=0, lt=1)
    """Share of the first model's weights in attention and MLPs that is gone then."""
    settle: int = Field(default=0, ge=0)
    """Steps without gates before the next stage."""


class GatesConfig(Frozen):
    """Learning which units to keep."""

    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    """One behind the other; the original takes three: to 75 %, 50 % and 25 % of the weights."""
    learning_rate: float = Field(default=0.02, gt=0)
    """Of gates and multipliers, by Adam; not scheduled."""
    ramp: Fraction = 1 / 3
    """Share of a stage's steps over which the wanted sparsity grows to the target."""
    sides: Sides = "two"
    """`two`: too much sparsity is pulled back as well (the paper). `one`: the published code."""
    multiplier: float = 10.0
    """Of both multipliers, at the start of a stage."""
    multiple: PositiveInt = 1
    """Widths and neurons that stay are rounded up to a multiple of this."""

    @model_validator(mode="after")
    def _ever_smaller(self) -> GatesConfig:
        targets = [stage.target for stage in self.stages]
        if sorted(set(targets)) != targets:
            raise ValueError(f"targets must grow from stage to stage, and are {targets}")
        return self


class LearnedGates:
    """A Part: the gates of one stage. It puts draws into the towers and learns from what comes
    back."""

    def __init__(
        self,
        config: GatesConfig,
        stage: int,
        towers: Mapping[str, GatedTower],
        *,
        whole: int,
        comm: Comm,
        seed: int,
    ) -> None:
        """`whole`: how many weights the first stage's model had (`prunable_weights`)."""
        self.config, self.stage, self.towers = config, config.stages[stage], dict(towers)
        self.start = config.stages[stage - 1].target if stage else 0.0
        self.whole, self.comm, self.seed = whole, comm, key_of(seed, "gates", stage)
        self.log_alpha = {
            name: Gates(*(torch.full_like(part, LARGEST) for part in tower.sizes))
            for name, tower in self.towers.items()
        }
        self.multipliers = Multipliers(*(torch.tensor(config.multiplier) for _ in range(2)))
        self._learn = torch.optim.Adam(self._gates(), lr=config.learning_rate)
        self._ascend = torch.optim.Adam(
            list(self.multipliers), lr=config.learning_rate, maximize=True
        )
        for tensor in (*self._gates(), *self.multipliers):
            tensor.requires_grad_()
        self.learned = 0
        """Steps of this stage so far."""
        self._show()

    # -- what the towers see ---------------------------------------------------------------------

    def final(self) -> dict[str, Gates]:
        """1 for every unit that stays, else 0."""
        with torch.no_grad():
            multiple = self.config.multiple
            return {
                name: Gates(
                    is_open(gates.hidden, multiple=multiple, least=1),
                    _open_rows(gates.heads, tower.sizes.heads),
                    _open_rows(gates.neurons, tower.sizes.neurons, multiple=multiple),
                )
                for (name, tower), gates in zip(
                    self.towers.items(), self.log_alpha.values(), strict=True
                )
            }

    def sparsity(self) -> Float[Tensor, ""]:
        """Expected share of the first model's weights that is gone; differentiable."""
        kept = torch.zeros(())
        for name, gates in self.log_alpha.items():
            tower = self.towers[name]
            shares = Gates(
                *(open_probability(p) * there for p, there in zip(gates, tower.sizes, strict=True))
            )
            kept = kept + kept_weights(shares, head_dim=tower.head_dim)
        return 1 - kept / self.whole

    def wanted(self) -> float:
        """The sparsity that this step asks for."""
        steps = round(self.config.ramp * self.stage.steps)
        return wanted_sparsity(
            self.learned, start=self.start, target=self.stage.target, steps=steps
        )

    def remove(self) -> None:
        """Take the gates out of the towers."""
        for tower in self.towers.values():
            tower.drawn = tower.final = None

    def _show(self) -> None:
        final, device = self.final(), self.comm.device
        for name, tower in self.towers.items():
            leaves = [
                part.detach().to(device, non_blocking=True).requires_grad_()
                for part in self._draw(name)
            ]
            tower.drawn = Gates(*leaves)
            tower.final = Gates(*(part.to(device, non_blocking=True) for part in final[name]))

    def _draw(self, name: str) -> Gates:
        """This step's draws, as a function of the gates."""
        generator = torch.Generator().manual_seed(key_of(self.seed, name, self.learned))
        return Gates(
            *(
                drawn(part, torch.rand(part.shape, generator=generator).clamp(EDGE, 1 - EDGE))
                * there
                for part, there in zip(self.log_alpha[name], self.towers[name].sizes, strict=True)
            )
        )

    # -- a Part ----------------------------------------------------------------------------------

    def gradients_finite(self) -> None:
        """Not known when it is asked: gradients come with the towers' backward pass."""
        return

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        """Learn from what all ranks' draws collected, and draw anew."""
        collected = self._collected()
        if applied and all(bool(torch.isfinite(part).all()) for part in collected):
            outputs = [part for name in self.log_alpha for part in self._draw(name)]
            value = lagrangian(
                self.sparsity(), self.wanted(), self.multipliers, sides=self.config.sides
            )
            torch.autograd.backward([*outputs, value], [*collected, torch.ones_like(value)])
            self._learn.step()
            self._ascend.step()
            with torch.no_grad():
                for part in self._gates():
                    part.clamp_(-LARGEST, LARGEST)
            self.learned += 1
        self._learn.zero_grad()
        self._ascend.zero_grad()
        self._show()

    def _collected(self) -> list[Tensor]:
        """The mean over ranks of the gradients of this step's draws, on the CPU."""
        found = []
        for tower in self.towers.values():
            assert tower.drawn is not None
            found += [
                torch.zeros_like(part) if part.grad is None else part.grad for part in tower.drawn
            ]
        own = torch.cat([part.flatten() for part in found])  # one sum, and the host waits once
        mean = (self.comm.sum(own) / self.comm.world_size).cpu()
        parts = mean.split([part.numel() for part in found])
        return [some.view(part.shape) for some, part in zip(parts, found, strict=True)]

    def state_share(self) -> NamedTensors:
        state = {"learned": torch.tensor(self.learned)}
        for name, tensor, optimizer in self._named():
            state[name] = tensor.detach()
            for key, value in optimizer.state[tensor].items():
                state[f"{name}.{key}"] = value.detach()
        return every_nth(state, self.comm)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.learned = int(state["learned"])
        with torch.no_grad():
            for name, tensor, optimizer in self._named():
                tensor.copy_(state[name])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{name}.{key}" in state:
                        optimizer.state[tensor][key] = state[f"{name}.{key}"].clone()
        self._show()

    def _gates(self) -> list[Tensor]:
        return [part for gates in self.log_alpha.values() for part in gates]

    def _named(self) -> list[tuple[str, Tensor, torch.optim.Adam]]:
        gates = [
            (f"{name}.{unit}", part, self._learn)
            for name, gates in self.log_alpha.items()
            for unit, part in zip(Gates._fields, gates, strict=True)
        ]
        own = zip(Multipliers._fields, self.multipliers, strict=True)
        return gates + [(f"multipliers.{name}", part, self._ascend) for name, part in own]


def _open_rows(log_alpha: Tensor, there: Tensor, *, multiple: int = 1) -> Tensor:
    """`is_open` of each layer's own units."""
    result = torch.zeros_like(log_alpha)
    for row, values, count in zip(result, log_alpha, there.sum(dim=1).int().tolist(), strict=True):
        if count:
            row[:count] = is_open(values[:count], multiple=multiple)
    return result
