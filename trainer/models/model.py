"""What the loop and the engine ask of a model besides being a module."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from trainer.types import Tower


class Model(nn.Module, ABC):
    """A module whose parameters belong to towers with depths."""

    @abstractmethod
    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of blocks, and recompute the rest backward."""

    @abstractmethod
    def count_parameters(self) -> dict[str, int]:
        """Parameters of each part, in all (`total`) and of those that learn (`trained`)."""

    @abstractmethod
    def parameter_depth(self, name: str) -> tuple[Tower, int]:
        """The tower of a parameter and the number of blocks above it."""
