"""Collectives with exact adjoints, as one object that is passed around.

Convention: every rank computes a loss of its own, and the objective is the mean of these losses.
The adjoint of "everybody gets everything" (all_gather) is then "everybody gets the sum of what
the others say about its part" (reduce_scatter), and the adjoint of a sum is a sum.
Nothing else in the project calls `torch.distributed`, except the engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.adjoints import AllGather, ReduceScatter, Sum
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.meeting import meeting_point, read_place

T = TypeVar("T")


@dataclass(frozen=True)
class Comm:
    """One rank's view of its group. `Comm.solo()` runs the same code with one rank."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None
    """The same ranks over their hosts' memory, where `group` is one of devices."""

    @classmethod
    def solo(cls, device: torch.device | str = "cpu") -> Comm:
        return cls(rank=0, world_size=1, device=torch.device(device))

    @classmethod
    @contextmanager
    def imagined(cls, world_size: int) -> Iterator[Comm]:
        """Rank 0 of a group whose others are not there: collectives return at once, with nothing
        in them. For counting what is sent."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise RuntimeError("this process is already one of a group")
        dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        try:
            yield cls(0, world_size, torch.device("cpu"), dist.group.WORLD)
        finally:
            dist.destroy_process_group()

    @classmethod
    def from_environment(cls, *, timeout_seconds: float = 1800.0) -> Comm:
        """Join the group that `deepspeed`, `torchrun` or `accelerate launch` has described.

        Without a launcher (plain `python`) this is a group of one. A ConfigError where the
        environment describes no group, or one that can't be joined within the time.
        """
        place = read_place(os.environ)
        for name, value in place.as_environment().items():
            os.environ[name] = value
        device = torch.device("cpu")
        if torch.cuda.is_available():
            if place.local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"LOCAL_RANK is {place.local_rank}, but this host shows "
                    f"{torch.cuda.device_count()} GPUs; start fewer processes per host"
                )
            device = torch.device("cuda", place.local_rank)
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            timeout = timedelta(seconds=timeout_seconds)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=meeting_point(place, timeout),
                rank=place.rank,
                world_size=place.world_size,
                timeout=timeout,
            )
        host = None if device.type == "cpu" else dist.new_group(backend="gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD, host)

    @property
    def ranks_here(self) -> int:
        """Ranks on this host, as the launcher says; all of them where it says nothing."""
        told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ""
        return int(told) if told.isdigit() else self.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def row_range(self, count: int) -> tuple[int, int]:
        """The global rows [first, last) that this rank owns of a table of `count` rows.

        Contiguous, ceil(count / W) rows a rank; the last ranks may own fewer or none.
        """
        size = -(-count // self.world_size)
        return min(self.rank * size, count), min((self.rank + 1) * size, count)

    def grid(self, size: int) -> tuple[Comm, Comm]:
        """Ranks in groups of `size` neighbours: those of this rank's group, and those that have
        its place in the other groups. Every rank must call it; `size` divides the world."""
        num_groups = self.world_size // size
        if num_groups * size != self.world_size:
            raise ValueError(f"{self.world_size} ranks do not make groups of {size}")
        if num_groups == 1 or size == 1:
            alone = Comm.solo(self.device)
            return (self, alone) if num_groups == 1 else (alone, self)
        rows = [range(group * size, (group + 1) * size) for group in range(num_groups)]
        columns = [range(place, self.world_size, size) for place in range(size)]
        return self._within(rows), self._within(columns)

    def _within(self, groups: Sequence[range]) -> Comm:
        """Every rank takes part in making every group, in the same order."""
        made = [dist.new_group(list(ranks)) for ranks in groups]
        hosts = [self.host and dist.new_group(list(ranks), backend="gloo") for ranks in groups]
        index = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
        own = groups[index]
        return Comm(own.index(self.rank), len(own), self.device, made[index], hosts[index])

    def beside(self) -> Comm:
        """The same ranks in a group of their own, on their hosts, for another thread."""
        if self.world_size == 1:
            return Comm.solo()
        group = dist.new_group(backend="gloo")
        return Comm(self.rank, self.world_size, torch.device("cpu"), group)

    # -- differentiable -------------------------------------------------------------------------

    def all_gather(self, rows: Tensor) -> Tensor:
        """Stack the ranks' rows: [n, ...] -> [W * n, ...], rank by rank. n is equal on all."""
        if self.world_size == 1:
            return rows
        found: Tensor = AllGather.apply(rows, self.group, self.world_size)
        return found

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Sum over ranks, then keep this rank's share: [W * n, ...] -> [n, ...]."""
        return (
            rows if self.world_size == 1 else ReduceScatter.apply(rows, self.group, self.world_size)
        )

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; every rank gets it, and its gradient is the sum of theirs."""
        return value if self.world_size == 1 else Sum.apply(value, self.group)

    # -- not differentiable ---------------------------------------------------------------------

    def max(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def min(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on one of them. Waits for ranks, not for devices."""
        return self.any_later(flag)()

    def any_later(self, flag: bool) -> Callable[[], bool]:
        """`any`, to be asked for its answer when that has long been there. Every rank asks."""
        value = torch.tensor(int(flag))
        if self.world_size == 1:
            return lambda: flag
        if self.host is None:
            value = self.max(value.to(self.device))
            return lambda: bool(value.item())
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.host, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(value.item())

        return answer

    def broadcast(self, value: Tensor, source: int = 0) -> Tensor:
        """The value that rank `source` holds; shapes and dtypes are equal on all ranks."""
        result = value.detach().clone().contiguous()
        if self.world_size > 1:
            dist.broadcast(result, source, group=self.group)
        return result

    def gather_rows(self, rows: Tensor) -> Tensor:
        """As `all_gather`, for row counts that differ between ranks; no gradient."""
        rows = rows.detach()
        if self.world_size == 1:
            return rows
        counts = self.all_gather(torch.tensor([rows.shape[0]], device=rows.device)).tolist()
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = self.all_gather(padded).split(max(counts)) if max(counts) else [rows] * len(counts)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def exchange(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Send rows to the ranks, `counts[r]` of them to rank r, in a row; what the ranks send
        here, in their order, and how many each. A rank receives its own rows alone."""
        if self.world_size == 1:
            return rows, list(counts)
        told = torch.tensor(counts, device=rows.device)
        received = torch.empty_like(told)
        dist.all_to_all_single(received, told, group=self.group)
        sizes: list[int] = received.tolist()
        found = rows.new_empty((sum(sizes), *rows.shape[1:]))
        dist.all_to_all_single(found, rows.contiguous(), sizes, list(counts), group=self.group)
        return found, sizes

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; it must survive JSON."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        payload = _written(value).to(self.device)
        sizes = self.all_gather(torch.tensor([payload.numel()], device=self.device)).tolist()
        rows = self.gather_rows(payload).cpu()
        return [_read(part) for part in rows.split(sizes)]

    def broadcast_json(self, value: Any, source: int = 0) -> Any:
        """The value that rank `source` passed; what the others pass is ignored.

        Each rank receives its bytes once, whatever the number of ranks.
        """
        if self.world_size == 1:
            return json.loads(json.dumps(value))
        own = _written(value if self.rank == source else None).to(self.device)
        size = int(self.broadcast(torch.tensor([own.numel()], device=self.device), source))
        payload = own if self.rank == source else own.new_empty(size)
        return _read(self.broadcast(payload, source).cpu())

    def barrier(self) -> None:
        if self.world_size > 1:
            self.any(False)

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        result = value.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(result, operation, group=self.group)
        return result


def leave_group() -> bool:
    """End the process group; whether there was one."""
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        dist.destroy_process_group()
    return joined


def agreed(comm: Comm, action: Callable[[], T]) -> T:
    """What `action` gives on every rank; where it fails on one, DataError on all, with each reason.

    Without this the others would wait for the rank that failed.
    """
    results: list[T] = []
    failure = None
    try:
        results.append(action())
    except (TrainerError, OSError) as error:
        failure = str(error)
    stop_together(comm, failure)
    return results[0]


def refuse_differing(comm: Comm, lines: Sequence[str], *, what: str) -> None:
    """DataError on all ranks where they do not hold the same lines, with the first that differ."""
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if len(set(comm.gather_json(digest))) == 1:
        return
    theirs = comm.broadcast_json(list(lines))
    odd = [pair for pair in zip_longest(lines, theirs, fillvalue="nothing") if pair[0] != pair[1]]
    here = f"{what} here and on rank 0 differ: {odd[0][0]} and {odd[0][1]}" if odd else None
    stop_together(comm, here)


def stop_together(comm: Comm, failure: str | None) -> None:
    """DataError on all ranks, with each rank's reason (and host, of several), if there is a failure
    on one of them; where all have the same reason, it alone.

    Costs one small collective where there is none.
    """
    if not comm.any(failure is not None):
        return
    told = comm.gather_json([failure, socket.gethostname()])
    one_host = len({host for _, host in told}) == 1
    named = [
        f"rank {rank}: {reason}" if one_host else f"rank {rank} on {host}: {reason}"
        for rank, (reason, host) in enumerate(told)
        if reason is not None
    ]
    same = len({reason for reason, _ in told}) == 1
    error = DataError(str(failure) if same else "; ".join(named))
    error.on_all_ranks = True
    raise error


def _written(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _read(payload: Tensor) -> Any:
    return json.loads(payload.numpy().tobytes())
