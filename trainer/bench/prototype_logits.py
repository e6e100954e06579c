"""Cross-entropy against very many rows: streamed here, and as a matrix of logits elsewhere.

    ours     the primitive of this project; nothing of batch x prototypes elements exists
    naive    torch's cross_entropy on the matrix of logits
    compile  the same function through torch.compile
    cce      the torch path of the cut-cross-entropy package, where that is installed

All get the same unit features and rows and return the same loss and gradients. Beside them stands
the time of the matrix products alone, which no implementation can beat: one of them forward, and
three forward and backward together.
"""

from __future__ import annotations

import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.bench.launch import launch
from trainer.bench.options import number_list
from trainer.config import Frozen, PositiveInt

Pass = Literal["forward", "forward+backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward+backward")
SIDES = ("ours", "naive", "compile", "cce")


class LogitsCase(Frozen):
    """One shape."""

    batch: PositiveInt = 1024
    prototypes: PositiveInt = 100_000
    dim: PositiveInt = 256
    threads: PositiveInt = 1
    rounds: PositiveInt = 3
    """Timed calls of each side, which take turns."""
    sides: tuple[str, ...] = SIDES
    most_logit_bytes: PositiveInt = 1 << 30
    """Sides that make a matrix of logits are left out where it would be larger."""


def sweep(
    batches: Sequence[int], prototypes: Sequence[int], dims: Sequence[int], **how: Any
) -> list[LogitsCase]:
    """Every combination of the sizes."""
    return [
        LogitsCase(batch=batch, prototypes=count, dim=dim, **how)
        for batch, count, dim in itertools.product(batches, prototypes, dims)
    ]


def add_options(command: ArgumentParser) -> None:
    command.add_argument("--batch", type=number_list, default=(1024,), help="sizes, as in 256,1024")
    command.add_argument("--prototypes", type=number_list, default=(100_000,), help="sizes")
    command.add_argument("--dim", type=number_list, default=(256,), help="sizes")
    command.add_argument("--threads", type=number_list, default=(1, 2), help="as in 1,2")
    command.add_argument("--rounds", type=int, default=3, help="timed calls of each side")
    command.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    text = "MiB of logits beyond which only ours runs"
    command.add_argument("--most-logits", type=int, default=1024, help=text)
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory into it")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    shapes = (options.batch, options.prototypes, options.dim)
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        how = {"threads": threads, "rounds": options.rounds, "sides": options.sides}
        rows += run(sweep(*shapes, **how, most_logit_bytes=options.most_logits << 20))
    if options.plot:
        from trainer.bench.prototype_logits_plot import plot

        plot(rows, options.plot)
    return rows


def run(cases: Sequence[LogitsCase]) -> list[dict[str, Any]]:
    """A row for each shape, pass and side; each shape in a process of its own.

    seconds, cpu_seconds: least of the rounds; extra_bytes: peak memory above the inputs, and
    backward above the gradient of the rows; peak_share: of the machine's speed in a large product
    of float32 matrices, counting the products that nobody can avoid; bound_share: of the time of
    these products alone, run the same way, at the better of two ways to cut them; load: programs
    that wanted a processor in the last minute, this one among them. On a CPU shares and ratios are
    of CPU time, which other programs on the machine disturb less.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = launch(
            *("trainer.bench.prototype_logits_worker", case.model_dump_json()),
            ranks=1,
            threads=case.threads,
        )
        rows += [_compared(row, found) for row in found]
    return rows


def _compared(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With the speed and the memory of the naive side as multiples of this one's."""
    naive = next((r for r in rows if r["name"] == "naive" and r["pass"] == row["pass"]), None)
    ratios: dict[str, float] = {}
    if naive is not None and row["seconds"] is not None and naive["seconds"] is not None:
        time = "seconds" if row["device"] == "cuda" else "cpu_seconds"
        ratios["speed_to_naive"] = round(naive[time] / row[time], 3)
        ratios["naive_memory_to_this"] = round(naive["extra_bytes"] / max(1, row["extra_bytes"]), 1)
    return {"bench": "prototype-logits", **row, **ratios}
