"""Who holds the others up: each rank's wait for data and own work, per step."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from trainer.comm import Comm

SLOW = 1.5
"""A rank is told of that takes so many times the median's time..."""
LEAST_SECONDS = 0.05
"""... and at least so much more, per step."""
MOST_RANKS = 64
"""Of so many every rank has curves of its own; of more only the slowest ones have."""
KINDS = ("data_seconds", "work_seconds")


class RankTimes:
    """Per step since the last look: seconds that a rank waited for its data, and seconds that its
    process computed (all its threads; what a GPU does is not in it, nor what waits for others)."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._last = (0, 0.0, time.process_time())
        self.hosts: list[str] = comm.gather_json(socket.gethostname())

    def look(self, step: int, wait_seconds: float) -> Float64[Tensor, "ranks 2"]:
        """Of all ranks, on all; `wait_seconds` is the total since the start. Collective."""
        before, waited, worked = self._last
        now = time.process_time()
        self._last = (step, wait_seconds, now)
        steps = max(step - before, 1)
        mine = [(wait_seconds - waited) / steps, (now - worked) / steps]
        row = torch.tensor([mine], dtype=torch.float64, device=self._comm.device)
        return self._comm.all_gather(row)

    def begin(self, step: int) -> None:
        self._last = (step, 0.0, time.process_time())


class Spread(NamedTuple):
    """The ranks' seconds per step, by kind."""

    data_seconds: list[float]
    work_seconds: list[float]

    def scalars(self) -> dict[str, float]:
        """For curves: each rank's, or those of the slowest; and how the fastest compares to it."""
        found: dict[str, float] = {}
        for kind, seconds in zip(KINDS, self, strict=True):
            found[f"ranks/{kind}_most"] = max(seconds)
            found[f"ranks/{kind}_score"] = min(seconds) / max(max(seconds), 1e-9)
            if 1 < len(seconds) <= MOST_RANKS:
                found |= {f"ranks/{kind}/{rank}": value for rank, value in enumerate(seconds)}
        return found

    def slow(self, hosts: Sequence[str]) -> str:
        """A sentence about the slowest rank, where it is much slower than the median."""
        said = []
        for words, seconds in zip(("waits for data", "computes"), self, strict=True):
            median = sorted(seconds)[len(seconds) // 2 if len(seconds) > 2 else 0]
            rank = max(range(len(seconds)), key=seconds.__getitem__)
            if seconds[rank] > max(SLOW * median, median + LEAST_SECONDS):
                said.append(
                    f"rank {rank} on {hosts[rank]} {words} {seconds[rank]:.3g} s a step, "
                    f"{'the other' if len(seconds) == 2 else 'half of the ranks at most'} "
                    f"{median:.3g} s"
                )
        return "; ".join(said)
