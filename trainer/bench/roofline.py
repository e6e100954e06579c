"""What bounds the prototype head on a GPU, by its products and the bytes that it moves: a model.

No time here was measured. Each phase takes as long as the slowest of its tensor-core products at
their peak, its exponentials, and its traffic with memory and with the second-level cache. Left out
are launches, the tails of waves, the draining of pipelines at a tile's end, and clocks under load.
"""

from __future__ import annotations

from typing import NamedTuple

from trainer.kernels.triton_logits import STORING, SUMMING, Launch, block_queries


class Device(NamedTuple):
    """What its maker states, dense, per second."""

    products: float
    """Floating-point operations of halves."""
    exponentials: float
    memory: float
    """Bytes."""
    cache: float
    """Bytes from the second-level cache; no maker states it, so that it is an assumption."""


H100 = Device(products=989.4e12, exponentials=132 * 16 * 1.83e9, memory=3.35e12, cache=5.5e12)


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

    def seconds(self, device: Device) -> float:
        return max(
            self.flops / device.products,
            self.exponentials / device.exponentials,
            self.memory_bytes / device.memory,
            self.cache_bytes / device.cache,
        )

    def share_of_peak(self, device: Device) -> float:
        return self.flops / device.products / self.seconds(device)


def phases(problem: Problem, architecture: str = "sm90") -> dict[str, Phase]:
    """The forward sum, and the three products of the backward pass.

    The probabilities are written once and read by both products that follow; the rows' gradient
    is read and written in float32 for each block of queries.
    """
    dim, halves = problem.dim, problem.halves
    block = min(block_queries(problem.rows * halves), problem.queries)
    summing, storing = SUMMING[architecture][0], STORING[architecture][0]
    operands = halves * dim * (1 / problem.rows + 1 / problem.queries)
    again = halves * dim / block
    return {
        "sum": Phase(2 * dim, 1, operands, _reloaded(summing, problem)),
        "store": Phase(2 * dim, 1, halves + again, _reloaded(storing, problem) + halves),
        "queries": Phase(2 * dim, 0, halves + again, halves + again),
        "rows": Phase(2 * dim, 0, halves + 2 * 4 * dim / block, halves + 2 * 4 * dim / block),
    }


def share_of_peak(problem: Problem, device: Device, architecture: str = "sm90") -> float:
    """Of all phases together: at most, as far as this model sees."""
    found = phases(problem, architecture).values()
    least = sum(phase.flops for phase in found) / device.products
    return least / sum(phase.seconds(device) for phase in found)


def _reloaded(launch: Launch, problem: Problem) -> float:
    """Bytes of both operands that a tile of logits brings on the chip."""
    return problem.halves * problem.dim * (1 / launch.queries + 1 / launch.rows)
