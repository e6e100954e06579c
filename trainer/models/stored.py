"""Loaded weights as their files hold them, for a model that the ranks will divide.

Files are mapped, and ranks of a host share their pages; a copy in float32 is each rank's own, and
a large model has no room for one a rank. So the blocks of a transformer stay in the half precision
of the files. A block is widened to float32 while it runs, and whoever divides the model takes one
parameter after another: the values are those of a model that was loaded in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_WANTED: ContextVar[bool] = ContextVar("towers are loaded as stored", default=False)
_HOOKS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
_NATIVE: ContextVar[bool] = ContextVar("blocks run as stored", default=False)


@contextmanager
def towers_as_stored(wanted: bool) -> Iterator[None]:
    """Within it, towers are loaded for somebody who divides them (`widened` in the end)."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def stored_type(path: Path | str) -> torch.dtype | None:
    """The half precision of all tensors of a folder; None where that is not wanted, or there is
    none of all."""
    if not _WANTED.get():
        return None
    kinds: set[str] = set()
    for file in Path(path).glob("*.safetensors"):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        kinds |= {said["dtype"] for name, said in header.items() if name != "__metadata__"}
    return _HALVES.get(kinds.pop()) if len(kinds) == 1 else None


def keep_as_stored(model: nn.Module) -> bool:
    """Widen what is in no block, and each block while it runs; False, and nothing is done, where
    a buffer has lost digits, or a model asks its first block for the precision of its input."""
    blocks = _outermost_blocks(model)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    first = next(model.parameters())
    half = {torch.bfloat16, torch.float16}
    if id(first) in inside or any(buffer.dtype in half for buffer in model.buffers()):
        return False
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.float()
    for block in blocks:
        running = _Running()
        _HOOKS[block] = [
            block.register_forward_pre_hook(running.begin),
            block.register_forward_hook(running.end, always_call=True),
        ]
    return True


def widened(model: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[nn.Parameter]:
    """Every parameter once, in `dtype` from then on: one at a time, so that who takes it away
    leaves room for the next. Must be exhausted."""
    for block in list(_outermost_blocks(model)):
        for hook in _HOOKS.pop(block, []):
            hook.remove()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        yield parameter


def is_as_stored(model: nn.Module) -> bool:
    return any(block in _HOOKS for block in model.modules())


@contextmanager
def running_as_stored(model: nn.Module) -> Iterator[None]:
    """All of it in the files' precision, for what does not depend on digits."""
    if not is_as_stored(model):
        yield
        return
    kept = [(p, p.data) for p in model.parameters() if p.dtype == torch.float32]
    half = next(p.dtype for p in model.parameters() if p.dtype != torch.float32)
    token = _NATIVE.set(True)
    try:
        for parameter, data in kept:
            parameter.data = data.to(half)
        with torch.autocast("cpu", half):
            yield
    finally:
        _NATIVE.reset(token)
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def seeming_wide(model: nn.Module) -> Iterator[None]:
    """Parameters of the right shape in float32, all of one number: for who looks at types alone."""
    half = (torch.bfloat16, torch.float16)
    kept = [(p, p.data) for p in model.parameters() if p.dtype in half]
    nothing = torch.zeros(1)
    try:
        for parameter, data in kept:
            parameter.data = nothing.expand(data.shape)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


class _Running:
    """Widens a block before it runs, and takes that back."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, block: nn.Module, *_: Any) -> None:
        if _NATIVE.get():
            return
        half = (torch.bfloat16, torch.float16)
        self._kept = [(p, p.data) for p in block.parameters() if p.dtype in half]
        for parameter, data in self._kept:
            parameter.data = data.float()

    def end(self, *_: Any) -> None:
        for parameter, data in self._kept:
            parameter.data = data
        self._kept = []


def _outermost_blocks(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    inner: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inner:
            found.append(module)
            inner |= set(module.modules())
    return found
