"""The float32 weights that an optimizer updates, and its moments: which piece of them a rank holds.

DeepSpeed keeps them in four ways. Stage 0 in float32 updates the model's own parameters; in
bfloat16 it updates whole float32 copies; stages 1 and 2 flat copies, of which a rank holds a
stretch that may begin in the middle of a parameter; stage 3 an equal share of every parameter. Here
all four read alike: of a parameter's values in a row, this rank holds some from a place on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trainer.comm import Comm

MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """This rank's consecutive values of a parameter."""

    start: int
    """Place of the first of them in the flattened parameter."""
    values: Tensor
    """Flat, in the optimizer's own memory: what is written there is what the next step reads."""


@runtime_checkable
class Stretched(Protocol):
    """Tensors by name of which a part can be read alone."""

    def stretch(self, name: str, begin: int, end: int) -> Tensor:
        """The values begin to end - 1 of a tensor in a row; fewer where it ends before."""
        ...


class Masters:
    """Every trained parameter's float32 values and moments, by parameter."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, comm: Comm, stage: int):
        self._engine = engine
        self._optimizer = optimizer
        self._comm = comm
        self._stage = stage
        self._copies = _whole_copies(engine.optimizer) if stage == 0 else {}
        if self._copies:
            self._undo_first_step()

    def piece(self, parameter: nn.Parameter, moment: str | None = None) -> Piece:
        """This rank's values of a weight, or of one of its moments; none of them may be its."""
        if self._stage == 0:
            master = self._copies.get(parameter, parameter)
            whole = master if moment is None else self._optimizer.state[master][moment]
            return Piece(0, whole.detach().view(-1))
        if self._stage == 3:
            return self._equal_share(parameter, moment)
        return _stretch(parameter, moment)

    def whole(self, parameter: nn.Parameter, piece: Piece) -> Tensor:
        """The parameter that the ranks' pieces make, in float32, on every rank. Collective."""
        device = self._comm.device
        if self._stage == 0:
            return piece.values.float().to(device).view(shape_of(parameter))
        flat = torch.zeros(shape_of(parameter).numel(), device=device)
        flat[piece.start : piece.start + piece.values.numel()] = piece.values.float().to(device)
        return self._comm.sum(flat).view(shape_of(parameter))

    def write(self, parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
        """Keep this rank's piece of a whole value. The model runs on it after `refresh`."""
        write_piece(self.piece(parameter, moment), value)

    def read(
        self,
        parameter: nn.Parameter,
        stretch: Callable[[int, int], Tensor],
        moment: str | None = None,
    ) -> None:
        """As `write`, of a value of which only this rank's stretch is asked for."""
        start, values = self.piece(parameter, moment)
        if values.numel():
            values.copy_(stretch(start, start + values.numel()))

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the weights that the model runs on be the float32 ones, rounded. Collective."""
        if self._stage == 0:
            for parameter, master in self._copies.items():
                parameter.data.copy_(master)
        elif self._stage == 3:
            _share_again(self._engine.optimizer)
        else:
            self._engine.optimizer.update_lp_params()

    def exchange(self, parameters: Mapping[str, nn.Parameter], pieces: Mapping[str, Piece]) -> None:
        """Weights and other values of the same pieces change places. Collective."""
        for name, parameter in parameters.items():
            mine = self.piece(parameter).values
            kept = mine.clone()
            mine.copy_(pieces[name].values)
            pieces[name].values.copy_(kept)
        self.refresh()

    def num_steps(self) -> int:
        """Steps that the optimizer has taken."""
        return max((int(state.get("step", 0)) for state in self._states()), default=0)

    def count_steps(self, steps: int) -> None:
        """Let the optimizer have taken so many."""
        for state in self._states():
            if torch.is_tensor(state.get("step")):
                state["step"].fill_(steps)
            elif "step" in state:
                state["step"] = steps

    def link_moments(self) -> None:
        """Let DeepSpeed's ZeRO-1 and 2 find the moments of every parameter group.

        0.19.8 links them once, after the first group of the first step, when the other groups
        have none yet; linking again finds them all.
        """
        if self._stage in (1, 2) and self.num_steps():
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _states(self) -> list[dict[str, Any]]:
        return list(self._optimizer.state.values())

    def _undo_first_step(self) -> None:
        """Stage 0 in bfloat16 makes its moments by a step without gradients, which counts as one
        and lets the float32 copies decay."""
        self._optimizer.state.clear()
        for parameter, master in self._copies.items():
            master.data.copy_(parameter)

    def _equal_share(self, parameter: Any, moment: str | None) -> Piece:
        zero = self._engine.optimizer
        padded, _ = zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=moment
        )
        start = min(self._comm.rank * padded.numel(), parameter.ds_numel)
        return Piece(start, padded.detach()[: parameter.ds_numel - start])


def write_piece(piece: Piece, value: Tensor) -> None:
    """Copy into a piece its values of a whole parameter; ValueError if they are too few."""
    end = piece.start + piece.values.numel()
    piece.values.copy_(value.reshape(-1)[piece.start : end])


def stretches(values: Mapping[str, Tensor]) -> Callable[[str, int, int], Tensor]:
    """How a part of a mapping's tensors is read: alone where it can be, else from the whole."""
    if isinstance(values, Stretched):
        return values.stretch
    return lambda name, begin, end: values[name].reshape(-1)[begin:end]


def shape_of(parameter: Any) -> torch.Size:
    """A parameter's whole shape, wherever its values are."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _whole_copies(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Float32 copies by the parameter that runs; empty where the optimizer has none."""
    running = getattr(optimizer, "fp16_groups", [])
    copies = getattr(optimizer, "fp32_groups", [])
    return {
        parameter: copy
        for pair in zip(running, copies, strict=True)
        for parameter, copy in zip(*pair, strict=True)
    }


def _stretch(parameter: Any, moment: str | None) -> Piece:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(0, torch.empty(0))
    values = mapping.get_hp_fragment(moment)
    return Piece(mapping.lp_fragment_address.start, values.detach().view(-1))


def _share_again(zero: Any) -> None:
    """As stage 3 ends a step: its 16-bit shares from the float32 ones, small parameters whole."""
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
