"""What is trained on frozen features: a small residual network and a linear classifier."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.comm import Comm

WIDTH = 4
"""The hidden layer has so many times the features' numbers."""


class Adapter(nn.Module):
    """Z = scale * MLP(F) + F with MLP = Linear, batch norm, ReLU, Linear."""

    def __init__(self, dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, WIDTH * dim)
        # Batch norm takes any constant off again, so the true gradient of this bias is zero. AdamW
        # would make whole steps of its rounding, and two ranks would part from one.
        self.inner.bias.requires_grad_(False)
        self.norm = BatchNorm(WIDTH * dim)
        self.outer = nn.Linear(WIDTH * dim, dim)
        self.scale = nn.Parameter(torch.full((1, dim), scale))

    def forward(self, features: Float[Tensor, "n dim"], comm: Comm) -> Float[Tensor, "n dim"]:
        hidden = self.norm(self.inner(features), comm).relu()
        tuned: Tensor = self.scale * self.outer(hidden) + features
        return tuned


class BatchNorm(nn.Module):
    """Batch norm over the rows of all ranks, so that ranks and rows per rank change nothing."""

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, dim: int, *, epsilon: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.epsilon, self.momentum = epsilon, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_variance", torch.ones(dim))

    def forward(self, rows: Float[Tensor, "n dim"], comm: Comm) -> Float[Tensor, "n dim"]:
        if not self.training:
            return self._scaled(rows - self.running_mean, self.running_variance)
        count = comm.sum(rows.new_tensor(float(rows.shape[0])))
        mean = comm.sum(rows.sum(dim=0)) / count
        variance = comm.sum((rows - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_variance.lerp_(unbiased, self.momentum)
        return self._scaled(rows - mean, variance)

    def _scaled(self, centred: Tensor, variance: Tensor) -> Tensor:
        return centred * (variance + self.epsilon).rsqrt() * self.weight + self.bias


def classifier(dim: int, num_classes: int) -> nn.Linear:
    """A linear layer with Kaiming-uniform weights and no bias at the start."""
    layer = nn.Linear(dim, num_classes)
    nn.init.kaiming_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
