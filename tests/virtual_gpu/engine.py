"""What the engine asks of DeepSpeed at stage 0, on any device: DeepSpeed's own is the CPU here."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.virtual_gpu.device import CUDA, VirtualGpu, Wait

FORWARD, STEP = Wait("", "forward pass"), Wait("", "step")
"""Marks among the waits."""


class PlainEngine:
    """Gradients are averaged over ranks in one sum each, and torch's optimizer steps."""

    optimizer = None

    def __init__(self, gpu: VirtualGpu, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.gpu, self.module, self._optimizer = gpu, model.to(CUDA), optimizer
        self.module.train()

    def __call__(self, *inputs: Any) -> Any:
        self.gpu.waits.append(FORWARD)
        return self.module(*inputs)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        for parameter in (p for p in self.module.parameters() if p.requires_grad):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())
        with self.gpu.unwatched():  # a GPU gets the fused step, which waits for nothing
            self._optimizer.step()
        self._optimizer.zero_grad()
        self.gpu.waits.append(STEP)

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> None:
        return None

    def destroy(self) -> None:
        pass
