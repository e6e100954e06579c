"""How the logits of very many rows are computed: by which program, in what pieces and precision."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from trainer.kernels.autotune import KernelSizes
from trainer.kernels.tiled import Tile

Backend = Literal["auto", "torch", "triton"]


class Way(NamedTuple):
    """Changes nothing about a result but its rounding, its time and its memory."""

    tile: Tile | None = None
    """Of plain torch, which picks one by device where None."""
    backend: Backend = "auto"
    """`auto`: Triton's kernels on a GPU, plain torch elsewhere."""
    operand_dtype: torch.dtype = torch.float16
    """What the kernels multiply; unit vectors use float16 best."""
    kernel_sizes: KernelSizes = "fixed"
    """Two runs of the kernels have equal bits unless these are timed."""
    kept_gib: float = 8.0
    """GiB of exponentials that the kernels may leave for the backward pass, in bfloat16, where
    logits have a bound. They are recomputed where they would take more: a third more products."""

    def operands(self, device: torch.device) -> torch.dtype | None:
        """The dtype of the kernels' operands; None for plain torch, in the inputs' dtype."""
        if self.backend == "torch" or (self.backend == "auto" and device.type != "cuda"):
            return None
        assert self.tile is None, "the kernels have no tiles to choose; use kernel_sizes"
        return self.operand_dtype


BEST_WAY = Way()
