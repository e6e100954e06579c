"""How many kernels a computation would launch: operations that are not only another view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode

NOTHING = {f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "detach")}
"""These only ask for memory, or not even that."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("aten::") and not function.is_view and name not in NOTHING:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


def launches_by_name(computation: Callable[[], object]) -> Counter[str]:
    """Also of tensors that have shapes and no numbers."""
    with _Counter() as counter:
        computation()
    return counter.names


def launches_of(computation: Callable[[], object]) -> int:
    return sum(launches_by_name(computation).values())
