"""What a run would cost on stated devices, without its data and without those devices."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.comm import Comm
from trainer.config import RunConfig, micro_batches
from trainer.errors import ConfigError
from trainer.models.flops import TrainingFlops
from trainer.models.model import Model
from trainer.plan.cards import UTILISATION, Card, wire_seconds
from trainer.plan.known_sizes import sizes_of
from trainer.plan.model import batch_of, cover_of, shapes_of, without_numbers
from trainer.plan.terms import Episode, Sizes, Term, episodes_of, terms_of
from trainer.plan.watching import Alive
from trainer.plan.zero_cost import Stage, Weights, on_the_wire, weights_of
from trainer.types import Batch

ROOM = 0.9
"""Share of a card's memory that a plan may fill; allocators and libraries have the rest."""


class Passes(NamedTuple):
    """The towers' work on one micro-batch."""

    flops: int
    """The model's, forward and backward."""
    forward: int
    """Of the forward pass alone."""
    blocks: int
    """Computed again backward where inputs of blocks are all that is kept."""
    activations: int
    """Most bytes alive at once."""
    cover: int
    """Of the look that a momentum copy takes first."""


class Plan(NamedTuple):
    """Of one run on one kind of device. Memory and FLOPs are a rank's, and of one step."""

    config: RunConfig
    card: Card
    world_size: int
    utilisation: float
    micro_batch: int
    num_micro_batches: int
    weights: Weights
    stage: Stage
    memory: dict[str, float]
    """Bytes by kind."""
    flops: dict[str, float]
    """What the device computes, by what for."""
    model_flops: float
    """The model's own, without what is computed twice."""
    sent: Counter[str]
    """Bytes of whole tensors by collective."""
    episode: Episode | None
    episode_seconds: float
    by_stage: dict[int, float]
    """Bytes of a rank under each stage, else equal."""
    samples_per_epoch: int | None
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def wire(self) -> float:
        """Bytes that a rank sends in a step."""
        return on_the_wire(self.sent, self.world_size)

    @property
    def compute_seconds(self) -> float:
        return sum(self.flops.values()) / (self.card.tflops * 1e12 * self.utilisation)

    @property
    def step_seconds(self) -> float:
        """Products, then what is sent: files of this project overlap neither."""
        return self.compute_seconds + wire_seconds(self.wire, self.card, self.world_size)

    @property
    def samples_per_second(self) -> float:
        return self.config.global_batch / self.step_seconds

    @property
    def hours(self) -> float:
        between = self.episode.times * self.episode_seconds if self.episode else 0.0
        return (self.config.steps * self.step_seconds + between) / 3600

    @property
    def run_flops(self) -> float:
        """Of the whole run on all devices, without what is computed twice."""
        clustering = 0.0
        if self.episode is not None:
            clustering = self.episode.times * self.episode.clustering_flops * self.world_size
        return self.config.steps * self.model_flops * self.world_size + clustering

    @property
    def best_stage(self) -> int:
        """The lowest that fits with the moments divided; 3 where none does."""
        fits = [
            n
            for n, size in self.by_stage.items()
            if n and size <= ROOM * self.card.memory_gib * 2**30
        ]
        return min(fits, default=3)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= ROOM * self.card.memory_gib * 2**30


def planned(
    config: RunConfig,
    *,
    card: Card,
    world_size: int,
    utilisation: float = UTILISATION,
    samples: int | None = None,
) -> Plan:
    """ConfigError where the batch does not divide, or a loaded tower's sizes are not known.

    `samples` is the size of an epoch; nothing of the data is opened.
    """
    if world_size < 1:
        raise ConfigError(f"world_size is {world_size}; plan with at least one")
    micro, count = micro_batches(
        global_batch=config.global_batch, micro_batch=config.micro_batch, world_size=world_size
    )
    file = _read_file(config)
    halves = _halves(file, card)
    dtype = torch.bfloat16 if halves else torch.float32
    stage = Stage.read(file, world_size=world_size, width=dtype.itemsize)
    with Comm.imagined(world_size) as comm, without_numbers(dtype):
        shapes = shapes_of(config, comm)
        passes = _passes(config, shapes.model, micro, dtype)
        weights = weights_of(shapes.model, config.optim)
        sizes = _sizes(config, comm, halves=card.halves and halves)
        num_tokens = 0 if shapes.tokenizer is None else len(shapes.tokenizer)
        terms = terms_of(config, sizes, num_tokens=num_tokens)
        terms += _teachers(config, sizes)
        episode = episodes_of(config, sizes)
    parts = _memory(config, passes, terms)
    averaged = config.average is not None or bool(getattr(config.recipe, "needs_copy", False))

    def memory(of: Stage) -> dict[str, float]:
        return {**of.kept(weights, average=averaged), **parts}

    flops = _flops(config, passes, terms, count)
    sent = stage.sent(weights, micro_batches=count)
    for term in terms:
        sent.update(term.sent)
    plan = Plan(
        *(config, card, world_size, utilisation, micro, count, weights, stage),
        memory=memory(stage),
        flops=flops,
        model_flops=sum(v for name, v in flops.items() if name not in ("again", "first pass")),
        sent=sent,
        episode=episode,
        episode_seconds=0.0,
        by_stage={n: sum(memory(stage._replace(number=n)).values()) for n in range(4)},
        samples_per_epoch=samples,
        notes=shapes.notes,
    )
    if episode is None:
        return plan
    extracted = passes.forward / micro * episode.samples / world_size
    work = extracted + episode.clustering_flops
    return plan._replace(episode_seconds=work / (card.tflops * 1e12 * utilisation))


def _read_file(config: RunConfig) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = json.loads(config.deepspeed.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {config.deepspeed}: {error}") from error
    return found


def _halves(file: Mapping[str, Any], card: Card) -> bool:
    said = file.get("bf16", {}).get("enabled", False)
    return card.halves if said == "auto" else bool(said)


def _sizes(config: RunConfig, comm: Comm, *, halves: bool) -> Sizes:
    model: Any = config.recipe.model
    head = getattr(model, "head", None)
    dim = model.embed_dim
    return Sizes(
        per_rank=config.global_batch // comm.world_size,
        dim=dim,
        projected=None if head is None else head.dim,
        comm=comm,
        halves=halves,
    )


def _passes(config: RunConfig, model: Model, rows: int, dtype: torch.dtype) -> Passes:
    """One pass of a micro-batch; gradients are dropped as they come, for ZeRO has its own."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_dropped)
    cover = cover_of(config, rows=rows, dtype=dtype)
    looked = 0
    if cover is not None:
        counted = TrainingFlops(model)
        with torch.no_grad():
            model(cover)
        looked = counted.forward
    batch = batch_of(config, model, rows=rows, dtype=dtype)
    counted = TrainingFlops(model)
    alive = Alive()
    alive.leave_out(*model.parameters(), *model.buffers(), *_tensors(batch))
    with alive:
        said = [v.float().sum() for v in model(batch).tensors().values() if v.requires_grad]
        torch.stack(said).sum().backward()
    assert counted.per_micro_batch is not None
    given = sum(value.numel() * value.element_size() for value in _tensors(batch))
    again = counted.forward if config.gradient_checkpointing else 0
    return Passes(counted.per_micro_batch, counted.forward, again, alive.peak + given, looked)


def _dropped(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(batch: Batch) -> list[Tensor]:
    values = [*batch[:-1], *(batch.more or {}).values()]
    return [value for value in values if isinstance(value, Tensor)]


def _flops(config: RunConfig, passes: Passes, terms: list[Term], count: int) -> dict[str, float]:
    found: dict[str, float] = {"towers": count * passes.flops}
    if passes.blocks:
        found["again"] = count * passes.blocks
    if count > 1:
        found["first pass"] = count * passes.forward
    if passes.cover:
        found["cover"] = count * passes.cover
    for term in terms:
        found[term.name] = found.get(term.name, 0.0) + term.flops
    return found


def _memory(config: RunConfig, passes: Passes, terms: list[Term]) -> dict[str, float]:
    """A step with several micro-batches has the losses' scratch when no activations are there."""
    scratch = max((term.scratch for term in terms), default=0.0)
    found = {"activations": float(passes.activations), "losses' scratch": scratch}
    if state := sum(term.state for term in terms):
        found["heads and teachers"] = state
    return found


def _teachers(config: RunConfig, sizes: Sizes) -> list[Term]:
    """A frozen pair that runs beside the student: twice its weights a token forward."""
    distill: Any = getattr(config.recipe, "distill", None)
    path = None if distill is None else distill.model
    if path is None:
        return []
    model: Any = config.recipe.model
    flops, weights = 0.0, 0
    for name in ("image", "text"):
        tower = sizes_of(str(path), name)
        block = 4 * tower.width**2 + 2 * tower.width * tower.mlp_width
        places = model.text_length
        if name == "image":
            places = (model.image_size // (tower.patch_size or 16)) ** 2 + 1
        flops += 2.0 * tower.layers * places * (block + 2 * places * tower.width)
        weights += tower.layers * block + (tower.vocabulary or 0) * tower.width
    width = 4 if distill.precision == "float32" else 2
    return [Term("teacher", flops * sizes.per_rank, 0.0, {}, state=float(width * weights))]


def epochs(plan: Plan) -> float | None:
    """Passes over the data, where its size is known."""
    if not plan.samples_per_epoch:
        return None
    return plan.config.steps * plan.config.global_batch / plan.samples_per_epoch


def gigabytes(count: float) -> str:
    """GiB with three digits that count, MiB below one."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    digits = max(0, 2 - int(math.log10(count / 2**30)))
    return f"{count / 2**30:.{digits}f} GiB"
