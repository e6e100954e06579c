"""A whole step of a sharded MLCD head: sampling, loss, gradients, clipping, row-sparse update.

Two heads take turns on the same features and labels: one whose rows learn when a step touches
them, and one that moves every row in every step, as an ordinary optimizer does. Run as a module,
this is one rank of the benchmark.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.bench.launch import launch
from trainer.bench.options import number_list
from trainer.comm import Comm
from trainer.config import Frozen, PositiveInt
from trainer.errors import ConfigError
from trainer.losses.learned_prototypes import ActiveRows, LogitOptions, prototype_statistics
from trainer.losses.multilabel import MultilabelOptions, multilabel_loss
from trainer.losses.one_pass import one_pass_multilabel_loss
from trainer.parts.prototype_head import PrototypeHead, PrototypeHeadConfig

SIDES = {"row-sparse": False, "dense": True}
ON_A_CPU = MultilabelOptions(logits=LogitOptions(scale=64.0))
ON_A_GPU = MultilabelOptions(logits=LogitOptions(scale=64.0, gather_dtype=torch.float16))


class HeadCase(Frozen):
    """What is measured. Sizes are of all ranks together."""

    prototypes: PositiveInt = 100_000
    dim: PositiveInt = 128
    batch: PositiveInt = 256
    labels: PositiveInt = 8
    """Of each sample."""
    sample_rate: float = 0.1
    rounds: PositiveInt = 5
    """Timed steps of each head."""
    threads: PositiveInt = 1
    """Of each rank."""


class Lap(NamedTuple):
    """Seconds of one step, or sums of them over ranks."""

    clock: float
    cpu: float
    update: float
    """CPU seconds of the update alone."""


def add_options(command: ArgumentParser) -> None:
    command.add_argument("--prototypes", type=int, default=100_000)
    command.add_argument("--dim", type=int, default=128)
    command.add_argument("--batch", type=int, default=256, help="samples over all ranks")
    command.add_argument("--rate", type=float, default=0.1, help="share of the rows in a step")
    command.add_argument("--ranks", type=number_list, default=(1, 2, 4), help="as in 1,2,4")
    command.add_argument("--rounds", type=int, default=5, help="timed steps of each")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    case = HeadCase(
        prototypes=options.prototypes,
        dim=options.dim,
        batch=options.batch,
        sample_rate=options.rate,
        rounds=options.rounds,
    )
    return run(case, ranks=options.ranks)


def run(case: HeadCase, *, ranks: Sequence[int] = (1, 2, 4)) -> list[dict[str, Any]]:
    """A row for each head and number of ranks.

    seconds: least of the slowest rank's time for a step; cpu_seconds: least of all ranks' CPU time
    together, what to compare on a busy machine; update_cpu_seconds: of the optimizer alone;
    ratio_to_dense: of cpu_seconds.
    """
    rows: list[dict[str, Any]] = []
    for world_size in ranks:
        if case.batch % world_size:
            raise ConfigError(f"batch {case.batch} is not divisible by {world_size} ranks")
        text = case.model_dump_json()
        found = launch("trainer.bench.head_step", text, ranks=world_size, threads=case.threads)
        dense = next(row["cpu_seconds"] for row in found if row["name"] == "dense")
        rows += [{**row, "ratio_to_dense": round(row["cpu_seconds"] / dense, 3)} for row in found]
    return rows


def measure(case: HeadCase, comm: Comm) -> list[dict[str, Any]]:
    """The same rows on every rank."""
    torch.set_num_threads(case.threads)
    heads = {name: _head(case, comm, dense=dense) for name, dense in SIDES.items()}
    losses = {name: _step(head, case, comm, 0)[1] for name, head in heads.items()}
    laps: dict[str, list[Lap]] = {name: [] for name in heads}
    for turn in range(1, case.rounds + 1):
        for name in sorted(heads, reverse=bool(turn % 2)):
            lap, losses[name] = _step(heads[name], case, comm, turn)
            laps[name].append(lap)
    return [_row(name, laps[name], losses[name], case, comm) for name in heads]


def _head(case: HeadCase, comm: Comm, *, dense: bool) -> PrototypeHead:
    config = PrototypeHeadConfig(sample_rate=case.sample_rate, dense=dense, clip_norm=5.0)
    return PrototypeHead(config, num_prototypes=case.prototypes, dim=case.dim, comm=comm, seed=1)


def _step(head: PrototypeHead, case: HeadCase, comm: Comm, step: int) -> tuple[Lap, float]:
    features, labels = _samples(case, comm, step)
    comm.barrier()
    clock, cpu = time.perf_counter(), time.process_time()
    loss = _loss(features, labels, head.active(labels, step), head.comm)
    loss.backward()
    applied = head.gradients_finite()
    before = time.process_time()
    head.after_step(step, applied=applied, learning_rate_factor=1.0)
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)
    end = time.process_time()
    return Lap(time.perf_counter() - clock, end - cpu, end - before), float(loss.detach())


def _loss(features: Tensor, labels: Tensor, active: ActiveRows, comm: Comm) -> Tensor:
    """With gradients in the forward pass where torch computes, from the kernels elsewhere."""
    if comm.device.type == "cpu":
        return one_pass_multilabel_loss(features, labels, active, comm, ON_A_CPU).loss
    statistics = prototype_statistics(features, labels, active, comm, ON_A_GPU.logits)
    return multilabel_loss(statistics, ON_A_GPU).loss


def _samples(case: HeadCase, comm: Comm, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(case.batch, case.dim, generator=generator)
    labels = torch.randint(case.prototypes, (case.batch, case.labels), generator=generator)
    mine = slice(*comm.row_range(case.batch))
    return features[mine].to(comm.device).requires_grad_(), labels[mine].to(comm.device)


def _row(name: str, laps: list[Lap], loss: float, case: HeadCase, comm: Comm) -> dict[str, Any]:
    seen = comm.gather_json([list(lap) for lap in laps])
    by_step = list(zip(*seen, strict=True))

    def least(column: int, joined: Callable[[list[float]], float]) -> float:
        return min(joined([lap[column] for lap in ranks]) for ranks in by_step)

    return {
        "bench": "head-step",
        "name": name,
        "ranks": comm.world_size,
        **case.model_dump(exclude={"rounds"}),
        "device": comm.device.type,
        "seconds": least(0, max),
        "cpu_seconds": least(1, sum),
        "update_cpu_seconds": least(2, sum),
        "loss": round(loss, 4),
    }


def main() -> None:
    comm = Comm.from_environment()
    rows = measure(HeadCase.model_validate_json(sys.argv[1]), comm)
    if comm.is_main:
        Path(sys.argv[2]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
