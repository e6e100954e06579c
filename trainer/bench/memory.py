"""Peak memory of a stretch of work: CUDA's own count, or live tensors where there is no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` held at once, above what was held before it.

    On CUDA what the allocator gave out, at its highest. On the CPU the bytes of all tensors that
    `work` made and that were alive together; what an operator allocates and frees inside itself
    is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    count = LiveBytes()
    with count:
        work()
    return count.peak


def peak_resident_bytes(work: Callable[[], object]) -> int:
    """The most physical memory that this process held during `work`, above what it held before.

    Sees everything, compiled code and libraries too, to a few hundred kilobytes. Linux only.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made within `with`, until each one dies."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}
        """Bytes by storage; none for one that was there before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, lambda tensor: self._see(tensor, made_here=False), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._see(tensor, made_here=True), result)
        return result

    def _see(self, tensor: Tensor, *, made_here: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if made_here else 0
        weakref.finalize(storage, self._forget, key)
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)
