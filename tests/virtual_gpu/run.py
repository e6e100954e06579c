"""Trains recipes on a pretended GPU: `python -m tests.virtual_gpu.run FOLDER CASE...`.

A program of its own, because Triton's interpreter has to be chosen before Triton is imported. It
takes its rank from the environment, and prints one JSON row a case.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.virtual_gpu.cases import config_of, prepare
from tests.virtual_gpu.device import CUDA, VirtualGpu, Wait, virtual_gpu
from tests.virtual_gpu.engine import FORWARD, STEP, PlainEngine
from tests.virtual_gpu.programs import PROGRAMS
from trainer import loop
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.engine import zero
from trainer.kernels import (
    triton_assign,
    triton_colour,
    triton_half_rows,
    triton_logits,
    triton_rows,
)

KERNELS = {
    triton_logits: ("exponential_product",),
    triton_assign: ("maxima_of_groups", "scores_of_groups"),
    triton_rows: ("adamw_of_rows",),
    triton_half_rows: ("adamw_of_half_rows",),
    triton_colour: ("contrast_sums", "colours", "blurred_along"),
}


@contextmanager
def on_virtual_gpu(comm: Comm) -> Iterator[VirtualGpu]:
    with virtual_gpu(KERNELS) as gpu, ExitStack() as stack:
        assert comm.host is not None
        gpu.host_groups.add(comm.host.group_name)

        def initialize(*, model: Any, optimizer: Any, **_: Any) -> tuple[PlainEngine]:
            return (PlainEngine(gpu, model, optimizer),)

        stack.enter_context(patch.object(zero.deepspeed, "initialize", initialize))
        stack.enter_context(patch.object(Comm, "from_environment", lambda **_: comm))
        yield gpu


def budget_of(waits: list[Wait]) -> dict[str, Any]:
    """Of the last step but one: waits before its first forward pass, and all, by place."""
    ends = [place for place, wait in enumerate(waits) if wait == STEP]
    step = waits[ends[-3] + 1 : ends[-2]]
    first = step.index(FORWARD)
    return {"before": listed(step[:first]), "all": listed(step)}


def listed(waits: list[Wait]) -> dict[str, int]:
    """How many, by place and kind."""
    return dict(Counter(f"{w.place} {w.kind}" for w in waits if w not in (FORWARD, STEP)))


def trained(gpu: VirtualGpu, config: RunConfig) -> dict[str, Any]:
    """What came of a run; where it failed, the end of the traceback."""
    try:
        outcome = loop.train(config)
    except Exception:
        return {"failed": traceback.format_exc()[-3000:]}
    return {"finished": outcome.finished, **budget_of(gpu.waits)}


def used(gpu: VirtualGpu, program: Callable[[], None]) -> dict[str, Any]:
    """What came of a program: its waits by place."""
    try:
        program()
    except Exception:
        return {"failed": traceback.format_exc()[-3000:]}
    return {"finished": True, "all": listed(gpu.waits)}


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    alone = Comm.from_environment(timeout_seconds=60.0)
    comm = Comm(alone.rank, alone.world_size, CUDA, alone.group, dist.new_group(backend="gloo"))
    size, spec = comm.world_size, alone.broadcast_json(prepare(root) if alone.is_main else "")
    with on_virtual_gpu(comm) as gpu:
        for case in cases:
            gpu.waits.clear()
            program = PROGRAMS.get(case)
            run = partial(program, root, spec, comm) if program else None
            row = used(gpu, run) if run else trained(gpu, config_of(case, root, spec, size))
            print(json.dumps({"case": case, "cpu": time.process_time(), **row}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main(*sys.argv[1:]))
