"""What bounds the prototype head on a GPU, by its products and the bytes that it moves: a model.

No time here was measured. Each phase takes as long as the slowest of its tensor-core products at
their peak, its exponentials, and its traffic with memory, with the second-level cache and, for the
kernel's own phases, with a processor's shared memory. Left out are launches, the tails of waves,
clocks under load, and that a program's products wait for its exponentials where no other program
runs beside it: these take the same time again at most. Stock products are counted by what they read
and write once; public measurements of such shapes reach 0.65 to 0.78 of the peak (`stock=0.7`).
"""

from __future__ import annotations

from typing import NamedTuple

from trainer.kernels.launches import STORING, Launch, forward_launches
from trainer.kernels.triton_logits import block_queries

WARP_GROUP_QUERIES = 64
"""Rows of the left operand of one tensor-core instruction; both operands lie in shared memory."""


class Device(NamedTuple):
    """What its maker states, dense, per second."""

    products: float
    """Floating-point operations of halves."""
    exponentials: float
    memory: float
    """Bytes."""
    cache: float
    """Bytes from the second-level cache; no maker states it, so that it is an assumption."""
    shared: float = float("inf")
    """Bytes from all processors' shared memory."""


H100 = Device(
    products=989.4e12,
    exponentials=132 * 16 * 1.83e9,
    memory=3.35e12,
    cache=5.5e12,
    shared=132 * 128 * 1.83e9,
)


class Problem(NamedTuple):
    """Of one rank: queries of all ranks, and its own rows."""

    queries: int
    rows: int
    dim: int
    halves: int = 2
    """Bytes of an operand."""


class Phase(NamedTuple):
    """Per logit, that is per pair of a query and a row."""

    flops: float
    exponentials: float
    memory_bytes: float
    cache_bytes: float
    shared_bytes: float = 0.0

    def seconds(self, device: Device) -> float:
        return max(
            self.flops / device.products,
            self.exponentials / device.exponentials,
            self.memory_bytes / device.memory,
            self.cache_bytes / device.cache,
            self.shared_bytes / device.shared,
        )

    def share_of_peak(self, device: Device) -> float:
        return self.flops / device.products / self.seconds(device)


STOCK = ("queries", "rows")
"""Phases that are plain products of whole matrices."""


def phases(problem: Problem, architecture: str = "sm90", *, keep: bool = True) -> dict[str, Phase]:
    """The forward pass, and the products of the backward pass.

    Where exponentials are kept, they are written once, in the forward pass, and read by two
    products. Elsewhere a block of queries at a time is computed again and written, and the rows'
    gradient is read and written in float32 for each block.
    """
    dim, halves = problem.dim, problem.halves
    operands = halves * dim * (1 / problem.rows + 1 / problem.queries)
    summing = forward_launches(architecture, dim, keeping=keep)[0]
    forward = _computed(summing, problem, written=halves if keep else 0, read=operands)
    if keep:
        gradients = 4 * dim * (1 / problem.rows + 1 / problem.queries)
        product = Phase(2 * dim, 0, halves + operands + gradients, halves + operands + gradients)
        return {"sum": forward, **dict.fromkeys(STOCK, product)}
    block = min(block_queries(problem.rows * halves), problem.queries)
    again = halves * dim / block
    return {
        "sum": forward,
        "store": _computed(STORING[architecture][0], problem, written=halves, read=again),
        "queries": Phase(2 * dim, 0, halves + again, halves + again),
        "rows": Phase(2 * dim, 0, halves + 2 * 4 * dim / block, halves + 2 * 4 * dim / block),
    }


def _computed(launch: Launch, problem: Problem, *, written: float, read: float) -> Phase:
    """A phase of the kernel: both operands of a tile come on the chip, or, where queries stay
    there, its rows alone."""
    reloaded = 1 / launch.queries + (0 if launch.resident else 1 / launch.rows)
    cache = problem.halves * problem.dim * reloaded + written
    instruction = 1 / WARP_GROUP_QUERIES + 1 / launch.rows
    shared = problem.halves * problem.dim * instruction
    return Phase(2 * problem.dim, 1, written + read, cache, shared)


def share_of_peak(
    problem: Problem,
    device: Device,
    architecture: str = "sm90",
    *,
    keep: bool = True,
    stock: float = 1.0,
) -> float:
    """Of all products together, with no product done twice counted twice: at most, as far as this
    model sees. `stock`: the share of the peak that stock products reach at best."""
    found = phases(problem, architecture, keep=keep)
    needed = 3 * 2 * problem.dim / device.products
    seconds = [
        max(phase.seconds(device), phase.flops / device.products / stock if name in STOCK else 0.0)
        for name, phase in found.items()
    ]
    return needed / sum(seconds)
