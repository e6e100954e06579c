"""How large the tensors get that a computation makes, and that it keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def largest_intermediate(computation: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of the computation returned."""
    with _Recorder() as recorder:
        computation()
    return recorder.largest


def saved_elements(computation: Callable[[], object]) -> int:
    """Elements that a forward pass holds on to, each storage once."""
    storages: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        storages[value.untyped_storage().data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        computation()
    return sum(storages.values())


class _Lifetimes(TorchDispatchMode):
    """Bytes of all storages that are alive at once. Also of tensors that only have a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.given: set[int] = set()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def peak_bytes(computation: Callable[[], object], *inputs: torch.Tensor) -> int:
    """The most that is allocated at once over the inputs, whose storages are not counted."""
    with _Lifetimes() as lifetimes:
        lifetimes.given = {value.untyped_storage()._cdata for value in inputs}
        computation()
    return lifetimes.peak
