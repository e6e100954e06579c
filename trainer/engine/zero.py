"""A model under DeepSpeed.

The engine hides the ZeRO stage: `engine(batch)` runs the sharded model, `backward` accumulates,
`step` applies, and weights, moments and buffers are read and written in full, by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

import deepspeed
import torch
from torch import Tensor, nn

import trainer.engine.lean_import  # noqa: F401
from trainer.comm import Comm
from trainer.config import OptimConfig
from trainer.engine.adam import adamw
from trainer.engine.blocks import gather_whole_blocks
from trainer.engine.copies import WeightCopy
from trainer.engine.deal import deal
from trainer.engine.groups import set_learning_rate
from trainer.engine.kept import Kept
from trainer.engine.masters import MOMENTS, Masters, Piece, stretches, write_piece
from trainer.engine.once import OncePerPass
from trainer.engine.pass_order import PassOrder
from trainer.engine.tower_norms import TowerNorms
from trainer.engine.zero_file import Decided, completed
from trainer.errors import CheckpointError
from trainer.models.model import Model
from trainer.models.stored import widened
from trainer.types import Batch, Features, TowerName


class Engine:
    """DeepSpeed's engine with one door in (`engine(batch)`) and state by parameter name.

    Gradients accumulate over any number of `backward` calls until `step`. Every loss is a mean
    over this rank's samples; DeepSpeed averages gradients over ranks. Nothing is scaled by the
    number of accumulated passes (`scale_wrt_gas=False`): whoever splits a loss divides it.
    """

    def __init__(
        self,
        model: Model,
        optim: OptimConfig,
        comm: Comm,
        *,
        deepspeed_config: Path,
        micro_batch: int,
        accumulation: int = 1,
    ) -> None:
        self.comm = comm
        self._optim = optim
        self._config = completed(deepspeed_config, comm, Decided(micro_batch, accumulation, optim))
        self.stage = int(self._config["zero_optimization"]["stage"])
        bf16 = bool(self._config.get("bf16", {}).get("enabled"))
        if bf16 and comm.device.type == "cpu":
            # The CPU's fused attention takes five times the plain products' time backward in bf16.
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        self._clips_itself = self.stage == 0 and not bf16
        if self._clips_itself:
            # DeepSpeed clips here too, but doesn't say what the norm was.
            self._config["gradient_clipping"] = 0.0
        self.gradient_norm: float | Tensor = 0.0
        """Global norm before clipping, of the last step; NaN if it was not finite."""
        self._copies: list[WeightCopy] = []
        self._start(model)

    def _start(self, model: Model) -> None:
        self._model = model
        self._optimizer = adamw(model, self._optim)
        self._once: OncePerPass | None = None
        if self.stage == 3:
            # A block is gathered whole: one collective instead of one per Linear, and a fifth less
            # time spent in hooks. What is live at a time is a block, as with checkpointing.
            self._once = OncePerPass(gather_whole_blocks(model))
            deal(model, self._config)
        else:
            for _ in widened(model):
                pass
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=self._config, dist_init_required=False
        )
        self._order = PassOrder(self._engine, self.stage)
        self._masters = Masters(self._engine, self._optimizer, self.comm, self.stage)
        self._tower_norms = TowerNorms(self.comm, divided=self.stage > 0)
        self._optimizer.register_step_pre_hook(self._tower_norms.look)
        if self._clips_itself:
            self._optimizer.register_step_pre_hook(lambda *_: self._clip(self._optim.clip_norm))

    # -- training -------------------------------------------------------------------------------

    def __call__(self, batch: Batch) -> Features:
        with self._once or contextlib.nullcontext():
            features: Features = self._engine(batch)
        return features

    @torch.no_grad()
    def encode(self, batch: Batch) -> Features:
        """Forward in evaluation mode, without gradient. Every rank must call it equally often."""
        self._engine.eval()
        with self._order.of_looks():
            features = self(batch)
        self._engine.train()
        return features

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate_factor: float, locked: Collection[TowerName] = ()) -> bool:
        """Apply the accumulated gradient and clear it.

        False, with no parameter and no moment changed anywhere, if any rank's gradient is not
        finite.
        """
        set_learning_rate(self._optimizer.param_groups, learning_rate_factor, locked)
        self._tower_norms.begin()
        if self.stage == 0 and self.comm.any(not _all_finite(self._engine.module)):
            self._engine.module.zero_grad()
            self.gradient_norm = float("nan")
            return False
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        norm = self._engine.get_global_grad_norm()
        if not applied:
            self.gradient_norm = float("nan")
        elif norm is not None:
            self.gradient_norm = norm
        return applied

    def learning_rates(self) -> dict[str, float]:
        """Of the last step, by tower: that of its topmost layer."""
        rates: dict[str, float] = {}
        for group in self._optimizer.param_groups:
            name = f"learning_rate/{group['tower']}"
            rates[name] = max(rates.get(name, 0.0), float(group["lr"]))
        return rates

    def tower_norms(self) -> dict[str, Tensor]:
        """`weight_norm/TOWER` after and `gradient_norm/TOWER` of the last step. Collective."""
        towers = {name: self._model.parameter_depth(name)[0] for name, _ in self._trained()}
        weights = ((towers[name], piece.values) for name, piece in self.pieces().items())
        return self._tower_norms.norms(weights, self.gradient_norm)

    # -- state by name --------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The wrapped module, for names and configuration only: its parameters are shards."""
        module: nn.Module = self._engine.module
        return module

    def weights_share(self) -> dict[str, Tensor]:
        """This rank's disjoint share of all trained weights and buffers, in full, on the CPU."""
        share = dict(self._shared(self._weight))
        return share | (self._buffers() if self.comm.is_main else {})

    def moments_share(self) -> dict[str, Tensor]:
        """This rank's disjoint share of Adam's moments, in full, on the CPU.

        Keys are `exp_avg/<parameter>` and `exp_avg_sq/<parameter>`. Empty before the first step.
        """
        if not any(MOMENTS[0] in state for state in self._optimizer.state.values()):
            return {}
        self._masters.link_moments()
        return {
            f"{key}/{name}": value
            for key in MOMENTS
            for name, value in self._shared(partial(self._moment, key))
        }

    def gathered_weights(self) -> dict[str, Tensor]:
        """All weights and buffers, frozen ones too, in float32 on the CPU; empty off rank 0."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                full = parameter.detach().float()
            full = self._weight(parameter) if parameter.requires_grad else full
            if self.comm.is_main:
                weights[name] = full.cpu().clone()
        return weights | (self._buffers() if self.comm.is_main else {})

    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], steps: int, batch: Batch
    ) -> None:
        """Continue Adam after `steps` updates; `weights` are in the module since before init.

        DeepSpeed makes the moments in its first step, so one is taken on `batch` with a gradient
        of zero and a learning rate of zero. The weights are set once more because the float32
        masters of a bf16 model were made from rounded ones. Of mappings that can read a stretch
        of a tensor, a rank reads its own values alone.
        """
        self._step_on_nothing(batch)
        self._masters.link_moments()
        weight, moment = stretches(weights), stretches(moments)
        for name, parameter in self._trained():
            self._masters.read(parameter, partial(weight, name))
            for key in MOMENTS:
                self._masters.read(parameter, partial(moment, f"{key}/{name}"), key)
        self._masters.refresh()
        for name, buffer in persistent_buffers(self.module).items():
            buffer.copy_(weights[name])
        self._masters.count_steps(steps)

    # -- other weights and other models ---------------------------------------------------------

    def pieces(self) -> dict[str, Piece]:
        """This rank's float32 values of each trained weight, as the optimizer holds them."""
        return {name: self._masters.piece(parameter) for name, parameter in self._trained()}

    def weight_copy(self) -> WeightCopy:
        """A copy of this rank's pieces, which `rebuild` carries over as it does the weights."""
        self._copies.append(WeightCopy(self.pieces()))
        return self._copies[-1]

    def wholes_share(self, pieces: Mapping[str, Piece]) -> Iterator[tuple[str, Tensor]]:
        """This rank's disjoint share of what the ranks' pieces make, in full, on the CPU."""
        names = {parameter: name for name, parameter in self._trained()}
        return self._shared(lambda p: self._masters.whole(p, pieces[names[p]]))

    @contextlib.contextmanager
    def running_on(self, pieces: Mapping[str, Piece]) -> Iterator[None]:
        """The model with other weights, of which each rank has its piece; then as it was.

        The two change places, so it costs no memory. All ranks enter and leave together, and take
        no step in between.
        """
        trained = dict(self._trained())
        self._masters.exchange(trained, pieces)
        try:
            yield
        finally:
            self._masters.exchange(trained, pieces)

    def rebuild(self, model: Model, batch: Batch, *, keep: Mapping[str, Kept]) -> None:
        """Go on with another model: a smaller one, or one with other layers.

        What `keep` says of a trained parameter of `model` is cut from the old float32 weights,
        moments and copies; one that it does not name is carried over whole where the old model has
        that name, else it starts as `model` has it, with moments of zero. The number of steps goes
        on. `model` brings its own buffers and frozen weights. Both models are in memory until this
        returns.
        """
        old, masters, before = self._engine, self._masters, dict(self._trained())
        copied = [copy.values for copy in self._copies]
        steps = self._masters.num_steps()
        self._masters.link_moments()
        self._start(model)
        if steps:
            self._step_on_nothing(batch)
            self._masters.link_moments()
            self._masters.count_steps(steps)
        carried = [
            (name, parameter, kept, before[kept.name])
            for name, parameter in self._trained()
            if (kept := keep.get(name, Kept(name))).name in before
        ]
        for _, parameter, kept, source in carried:
            for key in (None, *MOMENTS) if steps else (None,):
                whole = masters.whole(source, masters.piece(source, key))
                self._masters.write(parameter, kept.of(whole), key)
        self._masters.refresh()
        for copy, values in zip(self._copies, copied, strict=True):
            copy.begin_at(self.pieces())
            for name, _, kept, source in carried:
                write_piece(copy.values[name], kept.of(masters.whole(source, values[kept.name])))
        old.destroy()

    def bytes_per_rank(self) -> dict[str, int]:
        """Bytes of trained weights and of moments that this rank holds between steps."""
        shards = [getattr(p, "ds_tensor", p) for _, p in self._trained()]
        states = [s[key] for s in self._optimizer.state.values() for key in MOMENTS if key in s]
        return {
            "weights": sum(t.numel() * t.element_size() for t in shards),
            "moments": sum(t.numel() * t.element_size() for t in states),
        }

    # -- inside ---------------------------------------------------------------------------------

    def _clip(self, clip_norm: float) -> None:
        """Scale the averaged gradient, just before the optimizer reads it."""
        parameters = self._engine.module.parameters()
        self.gradient_norm = nn.utils.clip_grad_norm_(parameters, clip_norm)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def _shared(self, read: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, full value) of every W-th parameter; reading is collective, so all ranks do it."""
        for index, (name, parameter) in enumerate(self._trained()):
            value = read(parameter)
            if index % self.comm.world_size == self.comm.rank:
                yield name, value.detach().float().cpu().clone()

    def _buffers(self) -> dict[str, Tensor]:
        return {n: b.detach().cpu().clone() for n, b in persistent_buffers(self.module).items()}

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        return self._masters.whole(parameter, self._masters.piece(parameter))

    def _moment(self, key: str, parameter: nn.Parameter) -> Tensor:
        return self._masters.whole(parameter, self._masters.piece(parameter, key))

    def _step_on_nothing(self, batch: Batch) -> None:
        said = self(batch).tensors().values()
        outputs = [x.float().sum() for x in said if x.requires_grad]
        self.backward(torch.stack(outputs).sum() * 0.0)
        if not self.step(0.0):
            raise CheckpointError("the restored weights give outputs that are not finite")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state, such as running statistics."""
    state = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def _all_finite(module: nn.Module) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
