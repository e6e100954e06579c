"""Bytes of all storages that a computation has alive at once, and what it sends: also of tensors
that have shapes and no numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NAMES = {
    "c10d.allreduce_": "all_reduce",
    "c10d.allreduce_coalesced_": "all_reduce",
    "c10d._allgather_base_": "all_gather",
    "c10d.allgather_": "all_gather",
    "c10d.allgather_into_tensor_coalesced_": "all_gather",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.reduce_scatter_": "reduce_scatter",
    "c10d.reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d.broadcast_": "broadcast",
}


class Alive(TorchDispatchMode):
    """`peak` is the most that was alive at once of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: set[int] = set()

    def leave_out(self, *given: torch.Tensor) -> None:
        """Storages that were there before."""
        self._given |= {value.untyped_storage()._cdata for value in given}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        grown = False
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._given and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    grown = True
        if grown and sum(size for _, size in self._alive.values()) > self.peak:
            self._alive = {k: e for k, e in self._alive.items() if not e[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors of all collectives inside, by name: of the larger of what goes in
    and what comes out."""

    def __init__(self, *, at_least: int = 0) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._at_least = at_least

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).rsplit(".", 1)[0]
        if name.startswith("c10d."):
            size = max(_bytes(value) for value in args)
            if size >= self._at_least:
                self.bytes[_NAMES.get(name, name)] += size
        return function(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
