"""What the machine did for a step: time, memory, arithmetic."""

from __future__ import annotations

import sys

import torch
from torch import nn

from trainer.comm import Comm
from trainer.log.terminal import Speed
from trainer.models.flops import TrainingFlops


class Meter:
    """Figures of one rank's device, beside the speed of the run."""

    def __init__(
        self, comm: Comm, *, samples_per_micro_batch: int = 1, peak_tflops: float | None = None
    ) -> None:
        """`peak_tflops`: what the device can do, in 10^12 FLOPs a second, as its maker says."""
        self._comm = comm
        self._rows = samples_per_micro_batch
        self._peak = peak_tflops
        self._flops: TrainingFlops | None = None

    def watch(self, model: nn.Module) -> None:
        """Count FLOPs in the model's next forward pass, if that was not done yet."""
        if self._flops is None:
            self._flops = TrainingFlops(model)

    def peak_gib(self) -> float:
        """Most memory that this rank has held so far, in GiB: of the GPU's, else of its process."""
        if self._comm.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._comm.device) / 2**30
        return _most_resident_bytes() / 2**30

    def arithmetic(self, speed: Speed) -> dict[str, float]:
        """`tflops_per_device`, which the model's products took a second, and `utilisation`, their
        share of the stated peak; only what is known."""
        count = None if self._flops is None else self._flops.per_micro_batch
        if count is None:
            return {}
        a_second = count / self._rows * speed.samples_per_second / self._comm.world_size
        figures = {"tflops_per_device": a_second / 1e12}
        if self._peak is not None:
            figures["utilisation"] = a_second / 1e12 / self._peak
        return figures


def _most_resident_bytes() -> int:
    """0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
