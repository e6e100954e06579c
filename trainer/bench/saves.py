"""How long training stands still for a checkpoint: written beside it, and while it waits.

Both ways save the same tensors, weights and two moments in float32, in turns. What a step waits for
is `save` itself: the copy to the host's memory, or all of the writing, hashing and syncing.
Gathering the ranks' shares, which comes before either, is left out.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from trainer.bench.options import number_list
from trainer.checkpoint.beside import SavesBeside
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.comm import Comm

_ROWS = 1024


def add_options(command: ArgumentParser) -> None:
    command.add_argument(
        "--millions", type=number_list, default=(10, 40), help="of parameters, as in 10,40"
    )
    command.add_argument("--rounds", type=int, default=3, help="saves of each way")
    command.add_argument("--folder", type=Path, help="on the disk that is meant; else a new one")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    return [
        measured(million, rounds=options.rounds, folder=options.folder)
        for million in options.millions
    ]


def measured(millions: int, *, rounds: int, folder: Path | None = None) -> dict[str, Any]:
    """stall_waiting, stall_beside: median seconds until `save` returns; ratio: the second over the
    first; written_beside: until that checkpoint is on disk; mebibytes: of one checkpoint."""
    share = share_of(millions)
    stalls: dict[str, list[float]] = {"waiting": [], "beside": [], "written": []}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        ways = {
            "waiting": SavesBeside(Checkpointer(Path(place, "a"), Comm.solo()), waits=True),
            "beside": SavesBeside(Checkpointer(Path(place, "b"), Comm.solo()), waits=False),
        }
        for step in range(1, rounds + 1):
            for name, way in ways.items():
                began = time.perf_counter()
                way.save(step, {group: dict(values) for group, values in share.items()}, {}, {})
                stalls[name].append(time.perf_counter() - began)
                way.finish()
                if name == "beside":
                    stalls["written"].append(time.perf_counter() - began)
    waiting, beside = median(stalls["waiting"]), median(stalls["beside"])
    return {
        "million_parameters": millions,
        "mebibytes": sum(v.nbytes for values in share.values() for v in values.values()) / 2**20,
        "stall_waiting": waiting,
        "stall_beside": beside,
        "ratio": beside / waiting,
        "written_beside": median(stalls["written"]),
    }


def share_of(millions: int) -> dict[str, dict[str, Tensor]]:
    """Weights of so many million parameters, in tensors of a million and a half at most, and two
    moments of each. The moments' numbers are the weights'."""
    columns = 1_500_000 // _ROWS
    count = max(1, millions * 1_000_000 // (_ROWS * columns))
    weights = {f"weight.{number}": torch.randn(_ROWS, columns) for number in range(count)}
    kinds = ("exp_avg", "exp_avg_sq")
    moments = {f"{name}/{kind}": value for name, value in weights.items() for kind in kinds}
    return {"weights": weights, "moments": moments}
