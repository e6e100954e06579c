"""Batch normalisation whose batch is the micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trainer.comm import Comm
from trainer.models.exact import exact_buffers


class GlobalBatchNorm(nn.Module):
    """`nn.BatchNorm1d` over the rows of all ranks together, in float32.

    Training and extraction then see the same statistics however the batch is split over ranks
    (with one rank's rows alone they differ most in the first episodes). Gradients are exact:
    the sums go through `Comm.sum`. Running statistics stay float32 when the module is cast, and
    move only while gradients are recorded, so that a first pass without gradients counts once.
    Source: Ioffe, Szegedy, arXiv 1502.03167, algorithm 1.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self, width: int, comm: Comm, *, momentum: float = 0.1, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.comm = comm
        self.momentum = momentum
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_variance", torch.ones(width))

    def forward(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """Normalised rows, in the dtype of `rows`. In training all ranks must call it."""
        values = rows.float()
        if self.training:
            mean, variance = self._batch_statistics(values)
        else:
            mean, variance = self.running_mean, self.running_variance
        scaled = (values - mean) * torch.rsqrt(variance + self.epsilon)
        return (scaled * self.weight.float() + self.bias.float()).to(rows.dtype)

    def _batch_statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        # Two passes over the rows: a sum of squares minus a squared sum cancels in float32.
        size = self.comm.sum(values.new_full((1,), float(values.shape[0])))
        mean = self.comm.sum(values.sum(dim=0)) / size
        variance = self.comm.sum((values - mean).square().sum(dim=0)) / size
        if torch.is_grad_enabled():
            self._update_running(mean.detach(), variance.detach(), size)
        return mean, variance

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, size: Tensor) -> None:
        # A step that meets NaN is not applied, so it must not leave a trace here either.
        momentum = torch.where(torch.isfinite(variance.sum()), self.momentum, 0.0)
        unbiased = torch.nan_to_num(variance * (size / (size - 1).clamp(min=1.0)))
        self.running_mean.lerp_(torch.nan_to_num(mean), momentum)
        self.running_variance.lerp_(unbiased, momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalBatchNorm:
        with exact_buffers(self, persistent=True):
            super()._apply(fn, recurse)
        return self


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within it the norms in a module take the statistics of the batch, as in training.

    A target network does so (BYOL, arXiv 2006.07733), although it learns nothing. All ranks run it.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, GlobalBatchNorm)]
    before = [norm.training for norm in norms]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.training = training
