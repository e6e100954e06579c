"""A block that ZeRO-3 gathers whole may run once in a pass that has a gradient.

DeepSpeed 0.19.8 would put its gradients into one bucket twice, and stop at an assertion in the
backward pass that says neither which block nor why.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from trainer.errors import ConfigError


class OncePerPass:
    """A context of one forward pass: ConfigError for a trained block that runs in it twice."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._ran: set[str] | None = None
        for name, block in blocks.items():
            if any(parameter.requires_grad for parameter in block.parameters()):
                block.register_forward_pre_hook(partial(self._enter, name))

    def __enter__(self) -> None:
        self._ran = set() if torch.is_grad_enabled() else None

    def __exit__(self, *_: Any) -> None:
        # What runs from here on is checkpointing's second run of a block, which is no second use.
        self._ran = None

    def _enter(self, name: str, *_: Any) -> None:
        if self._ran is None:
            return
        if name in self._ran:
            raise ConfigError(
                f"{name} runs twice in one pass, and under ZeRO-3 a block runs once between two "
                "steps: put the views below each other in one batch (torch.cat), or use ZeRO "
                "stage 0, 1 or 2"
            )
        self._ran.add(name)
