"""Most memory that a few real steps of an engine take, beyond what was there before: a process of
its own, so that nothing else is in the figure."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from trainer.comm import Comm
from trainer.config import load_run
from trainer.engine.accumulate import accumulate
from trainer.engine.zero import Engine
from trainer.losses.contrastive import info_nce
from trainer.plan.model import batch_of, shapes_of
from trainer.types import Losses


def most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    run, size, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = load_run(run)
    torch.rand(512, 512).matmul(torch.rand(512, 512))  # libraries' own buffers are made
    with Comm.imagined(size) as comm:
        begun = resident()
        model = shapes_of(config, comm).model
        batch = batch_of(config, model, rows=rows, dtype=torch.float32)
        count = config.global_batch // size // rows
        engine = Engine(
            *(model, config.optim, comm),
            deepspeed_config=config.deepspeed,
            micro_batch=rows,
            accumulation=count,
        )
        for _ in range(2):
            accumulate(
                engine,
                lambda f, b: Losses.of(
                    clip=info_nce(
                        f.tensor("image"), f.tensor("text"), f.tensor("logit_scale"), comm
                    )
                ),
                [batch] * count,
            )
            engine.step(0.0)
        print(json.dumps(most_bytes() - begun))


if __name__ == "__main__":
    main()
