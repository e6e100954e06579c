"""Projection heads into the space where prototypes live (ProtoCLIP, arXiv 2206.10996)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.models.batch_norm import GlobalBatchNorm
from trainer.models.config import HeadConfig


class ProjectionHead(nn.Module):
    """`layers` x (Linear, norm, ReLU), then Linear; reads the tower's output unnormalised."""

    def __init__(
        self, config: HeadConfig, *, input_dim: int, comm: Comm, bias: bool = True
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = input_dim
        for _ in range(config.layers):
            blocks += [nn.Linear(width, config.hidden, bias=bias), _norm(config, comm), nn.ReLU()]
            width = config.hidden
        self.layers = nn.Sequential(*blocks, nn.Linear(width, config.dim, bias=bias))

    def forward(self, rows: Float[Tensor, "n input"]) -> Float[Tensor, "n dim"]:
        """Projected rows, not normalised."""
        projected: Tensor = self.layers(rows)
        return projected


def _norm(config: HeadConfig, comm: Comm) -> nn.Module:
    match config.norm:
        case "batch":
            return GlobalBatchNorm(config.hidden, comm)
        case "layer":
            return nn.LayerNorm(config.hidden)
        case "none":
            return nn.Identity()
