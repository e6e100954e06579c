"""How many kernels a computation would launch: operations that are not only another view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NOTHING = {f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "detach")}
"""These only ask for memory, or not even that."""


class _Counter(TorchDispatchMode):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if self.device is not None and all(one.device.type != self.device for one in given):
            return function(*args, **(kwargs or {}))
        if name.startswith("aten::") and not function.is_view and name not in NOTHING:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def launches_by_name(computation: Callable[[], object], device: str | None = None) -> Counter[str]:
    """Also of tensors that have shapes and no numbers. With a device, of operations on tensors that
    are there."""
    with _Counter(device) as counter:
        computation()
    return counter.names


def launches_of(computation: Callable[[], object]) -> int:
    return sum(launches_by_name(computation).values())
