"""What ZeRO keeps on a rank and sends in a step, by stage. Measured on DeepSpeed 0.19.8.

Sent are bytes of whole tensors: of what all ranks hold of a gathered one together. A test counts
the same in a step of the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.config import OptimConfig
from trainer.engine.groups import parameter_groups
from trainer.models.model import Model

_REUSE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered between forward and backward, where a file says nothing."""


class Weights(NamedTuple):
    """Sizes of a model's parameters."""

    trained: tuple[int, ...]
    """Elements of each trained parameter."""
    frozen: int
    """Elements of all frozen ones."""
    groups: tuple[int, ...]
    """Elements of each of the optimizer's groups."""

    @property
    def learnt(self) -> int:
        return sum(self.trained)


def weights_of(model: Model, optim: OptimConfig) -> Weights:
    groups = parameter_groups(model.named_parameters(), optim, model.parameter_depth)
    parameters = list(model.parameters())
    return Weights(
        trained=tuple(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        groups=tuple(sum(p.numel() for p in group["params"]) for group in groups),
    )


class Stage(NamedTuple):
    """How a DeepSpeed file divides a model over the ranks."""

    number: int
    world_size: int
    width: int
    """Bytes of an element of the working weights."""
    bucket: int = 500_000_000
    """Elements of the buffer that gradients are reduced from."""
    persists: int = 100_000
    """Of ZeRO-3: parameters with fewer elements stay whole on every rank."""
    live: int = _REUSE
    """Of ZeRO-3: elements that may be whole at once."""
    prefetch: int = 50_000_000
    """Of ZeRO-3: elements that are gathered into one buffer, ahead of the layers that need them."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    @classmethod
    def read(cls, file: Mapping[str, Any], *, world_size: int, width: int) -> Stage:
        """As a completed DeepSpeed file says."""
        zero = file.get("zero_optimization", {})

        def offloads(key: str) -> bool:
            return str((zero.get(key) or {}).get("device", "none")) != "none"

        return cls(
            number=int(zero.get("stage", 0)),
            world_size=world_size,
            width=width,
            bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
            persists=int(zero.get("stage3_param_persistence_threshold", 100_000)),
            live=min(
                int(zero.get("stage3_max_live_parameters", _REUSE)),
                int(zero.get("stage3_max_reuse_distance", _REUSE)),
            ),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
            offloads_optimizer=offloads("offload_optimizer"),
            offloads_weights=offloads("offload_param"),
        )

    # -- memory of a rank, in bytes ---------------------------------------------------------------

    def kept(self, weights: Weights, *, average: bool = False) -> dict[str, float]:
        """Bytes of working weights, gradients, and what the optimizer holds."""
        whole, size, count = self.width, self.world_size, weights.learnt
        share = 1 if self.number == 0 else 1 / size
        masters = 0 if self.number == 0 and whole == 4 else 4 * count * share
        moments = masters + 8 * count * share
        if average:
            moments += 4 * count * share
        found = {
            "weights": whole * (count + weights.frozen) * (1 / size if self.number == 3 else 1),
            "gradients": self._gradients(count),
            "moments": moments,
        }
        if self.number == 3:
            found["weights"] += self._gathered(count + weights.frozen)
        if self.offloads_weights:
            found["weights"] = self._gathered(count + weights.frozen)
        if self.offloads_optimizer:
            found["moments"] = 0.0
        return found

    def _gathered(self, count: int) -> float:
        """Whole parameters, and the buffer that the last ones came in: they are copied out of it,
        and it lives until the last layer that it was filled for."""
        return self.width * (min(self.live, count) + min(self.prefetch, count))

    def _gradients(self, count: int) -> float:
        """Gradients, the bucket that they are reduced from, and their share in float32.

        ZeRO-3 makes that share for the optimizer's step alone, when nothing is gathered; it is
        told where it is more than what was gathered.
        """
        whole, size = self.width, self.world_size
        if self.number == 0:
            return whole * count
        own = 4 * count / size
        if self.number == 1:
            return whole * count + own
        bucket = whole * min(self.bucket, count)
        if self.number == 3:
            own = max(0.0, own - self._gathered(count))
        return bucket + whole * count / size + own

    # -- traffic of a step ------------------------------------------------------------------------

    def sent(self, weights: Weights, *, micro_batches: int) -> Counter[str]:
        """Bytes of whole tensors by collective; of the step's few flags nothing is said.

        ZeRO-3 gathers a model once where a step has one micro-batch: what it holds between forward
        and backward stays. Of several, each gathers it for its pass without gradient, for the
        second one, and backward.
        """
        backwards, forwards = micro_batches, 1 if micro_batches == 1 else 3 * micro_batches
        found: Counter[str] = Counter()
        size, whole = self.world_size, self.width
        if size == 1:
            return found
        if self.number == 0:
            found["all_reduce"] = whole * weights.learnt
        elif self.number < 3:
            times = backwards if self.number == 2 else 1
            found["all_reduce"] = times * whole * weights.learnt
            found["all_gather"] = whole * sum(_up(n, 2 * size) for n in weights.groups)
        else:
            padded = [(n, _up(n, size)) for n in weights.trained]
            large = sum(up for n, up in padded if n > self.persists)
            small = sum(up for n, up in padded if n <= self.persists)
            found["all_gather"] = whole * (forwards * large + small)
            found["reduce_scatter"] = backwards * whole * (large + small)
        return found


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def on_the_wire(sent: Mapping[str, float], world_size: int) -> float:
    """Bytes that each rank sends where rings carry the collectives."""
    share = (world_size - 1) / world_size
    times = {"all_reduce": 2.0}
    return sum(times.get(name, 1.0) * share * count for name, count in sent.items())
