"""Which sizes of a kernel's program to run: fixed by the architecture, or the fastest of a few.

Other sizes are another order of sums, so the last bits of a result depend on the choice. `fixed`,
the default, is a table: the same bits in every run, on every machine of an architecture. `timed`
runs each candidate on the first problem of its class, and remembers the fastest until the process
ends: results of two runs then agree to rounding only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeVar

import torch

KernelSizes = Literal["fixed", "timed"]

Candidate = TypeVar("Candidate")

ROUNDS = 3
"""Timed runs of a candidate, of which the fastest counts."""

_FASTEST: dict[Hashable, Any] = {}


def chosen(
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
    *,
    sizes: KernelSizes,
    problem: Hashable,
    device: torch.device,
) -> Candidate:
    """The first candidate if sizes are fixed, else the one that runs fastest in this class of
    problems. Of equally fast ones the first."""
    if sizes == "fixed" or len(candidates) == 1:
        return candidates[0]
    if problem not in _FASTEST:
        _FASTEST[problem] = min(candidates, key=lambda one: _seconds(lambda: run(one), device))
    fastest: Candidate = _FASTEST[problem]
    return fastest


def size_class(*sizes: int) -> tuple[int, ...]:
    """Sizes between the same powers of two are of one class."""
    return tuple(size.bit_length() for size in sizes)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()  # compiles
    return min(_lap(run, device) for _ in range(ROUNDS))


def _lap(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
