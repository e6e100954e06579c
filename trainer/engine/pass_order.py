"""Passes that look have an order of modules of their own, so that ZeRO-3 fetches ahead in both.

DeepSpeed fetches weights ahead by the order in which the pass before has met the modules, and has
one such order. Where passes with and without a gradient take turns (a momentum copy that scores, an
evaluation) each would find the other's, drop it, and wait for every block.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode

_OWNER = "_PartitionedParameterCoordinator__"
"""DeepSpeed 0.19.8 has no public name for these."""


class PassOrder:
    """The order of looks, kept beside that of training; one changes places with the other.

    Below stage 3 there is nothing to fetch.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        self._kept: dict[str, Any] = {}
        if stage < 3:
            return
        self._coordinator = engine.optimizer.parameter_offload.param_coordinator
        self._kept = {
            "trace_mode": ZeRoTraceMode.INVALID,
            "submodule_order": [],
            "param_order": [],
            "step_id_module_fetched_for": defaultdict(deque),
        }
        for name in self._kept:
            getattr(self._coordinator, _OWNER + name)  # another version ends here: it has none

    @contextmanager
    def of_looks(self) -> Iterator[None]:
        """All passes inside are looks. What fetches were on their way ends with the next pass."""
        self._change_places()
        try:
            yield
        finally:
            self._change_places()

    def _change_places(self) -> None:
        for name, value in self._kept.items():
            self._kept[name] = getattr(self._coordinator, _OWNER + name)
            setattr(self._coordinator, _OWNER + name, value)
