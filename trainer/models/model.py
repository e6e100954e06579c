"""What the loop and the engine ask of a model besides being a module."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from trainer.types import TowerName


class Model(nn.Module, ABC):
    """A module whose parameters belong to towers with depths."""

    why_not_exported: str = ""
    """Why no exported form holds what this model says; empty where one does."""

    @abstractmethod
    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of blocks, and recompute the rest backward."""

    def count_parameters(self) -> dict[str, int]:
        """Parameters of each part, in all (`total`) and of those that learn (`trained`).

        Under ZeRO-3 call it before the engine partitions them.
        """
        counts = {
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in self.named_children()
        }
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {**counts, "total": sum(counts.values()), "trained": trained}

    @abstractmethod
    def parameter_depth(self, name: str) -> tuple[TowerName, int]:
        """The tower of a parameter and the number of blocks above it."""
