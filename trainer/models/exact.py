"""Buffers that stay in float32 when the module around them is cast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def exact_buffers(module: nn.Module, *, persistent: bool) -> Iterator[None]:
    """Within it, `_apply` may move float buffers of `module` but not round them.

    `persistent` chooses the module's own state (running statistics), else the tables that a
    model computes once (rotary frequencies), those of submodules included: in bfloat16 a
    rotary frequency is off by up to 0.2 %, and the phase after 500 tokens by up to a radian.
    """
    before = list(_float_buffers(module, persistent=persistent))
    yield
    for owner, name, exact in before:
        moved = owner._buffers[name]
        if moved is not None and moved.dtype != exact.dtype and not moved.is_meta:
            owner._buffers[name] = exact.to(device=moved.device)


def _float_buffers(
    module: nn.Module, *, persistent: bool
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in [module] if persistent else module.modules():
        for name, buffer in owner._buffers.items():
            is_persistent = name not in owner._non_persistent_buffers_set
            if buffer is None or buffer.dtype != torch.float32 or is_persistent != persistent:
                continue
            yield owner, name, buffer
