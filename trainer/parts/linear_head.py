"""A small linear layer on features that all ranks hold: classes or values that are known.

For tables that fit on every rank; `trainer.parts.prototype_head` divides large ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from trainer.comm import Comm
from trainer.config import Frozen
from trainer.errors import CheckpointError
from trainer.recipe import every_nth


class LinearHeadConfig(Frozen):
    """How the layer learns, by AdamW in float32."""

    learning_rate: NonNegativeFloat = 1e-3
    """At the schedule's factor of one."""
    weight_decay: NonNegativeFloat = 0.0
    """Beside the gradient, as in torch.optim.AdamW."""


class LinearHead:
    """`rows @ weight.T + bias`; a Part. Starts at zero: it knows nothing, and moves nothing."""

    def __init__(self, config: LinearHeadConfig, *, outputs: int, dim: int, comm: Comm) -> None:
        self._config, self._comm = config, comm
        self.weight = torch.zeros(outputs, dim, device=comm.device, requires_grad=True)
        self.bias = torch.zeros(outputs, device=comm.device, requires_grad=True)
        self._optimizer = torch.optim.AdamW(
            [self.weight, self.bias],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            foreach=True,
        )

    def __call__(self, rows: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch outputs"]:
        return linear(rows.float(), self.weight, self.bias)

    def gradients_finite(self) -> bool | None:
        """Makes the gradients those of the mean of all ranks' losses, too."""
        for leaf in (self.weight, self.bias):
            if leaf.grad is not None:
                leaf.grad = self._comm.sum(leaf.grad) / self._comm.world_size
        seen = [leaf.grad for leaf in (self.weight, self.bias) if leaf.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in seen)

    def after_step(self, step: int, *, applied: bool, learning_rate_factor: float) -> None:
        if applied:
            for group in self._optimizer.param_groups:
                group["lr"] = self._config.learning_rate * learning_rate_factor
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state_share(self) -> dict[str, Tensor]:
        return every_nth({name: value.cpu() for name, value in self._state().items()}, self._comm)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found, own = list(state["weight"].shape), list(self.weight.shape)
        if found != own:
            raise CheckpointError(
                f"the checkpoint's linear head is {found[0]} x {found[1]}, this one {own[0]} x "
                f"{own[1]}; the groups of the data are others"
            )
        with torch.no_grad():
            for name, leaf in (("weight", self.weight), ("bias", self.bias)):
                leaf.copy_(state[name])
                if f"{name}.exp_avg" in state:
                    moments = ("exp_avg", "exp_avg_sq", "step")
                    device = {"step": torch.device("cpu")}
                    self._optimizer.state[leaf] = {
                        moment: state[f"{name}.{moment}"].to(
                            device.get(moment, leaf.device), copy=True
                        )
                        for moment in moments
                    }

    def _state(self) -> dict[str, Tensor]:
        said: dict[str, Tensor] = {}
        for name, leaf in (("weight", self.weight), ("bias", self.bias)):
            said[name] = leaf.detach()
            moments = self._optimizer.state.get(leaf, {})
            said |= {f"{name}.{moment}": value for moment, value in moments.items()}
        return said


def mean_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"], comm: Comm
) -> Float[Tensor, ""]:
    """Nats, over the samples of all ranks that have a label (>= 0).

    Its mean over ranks is that mean, so ranks with more labels weigh more.
    """
    return _mean_known(cross_entropy(logits, labels.clamp_min(0), reduction="none"), labels, comm)


def mean_squared_error(
    values: Float[Tensor, " batch"],
    wanted: Float[Tensor, " batch"],
    labels: Int64[Tensor, " batch"],
    comm: Comm,
) -> Float[Tensor, ""]:
    """Over the samples of all ranks that have a value (label >= 0)."""
    return _mean_known((values - wanted).square(), labels, comm)


def _mean_known(rows: Tensor, labels: Tensor, comm: Comm) -> Tensor:
    known = labels >= 0
    count = comm.sum(known.sum()) / comm.world_size
    return torch.where(known, rows, 0.0).sum() / count.clamp_min(1 / comm.world_size)
