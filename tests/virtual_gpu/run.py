"""Trains recipes on a pretended GPU: `python -m tests.virtual_gpu.run FOLDER CASE...`.

A program of its own, because Triton's interpreter has to be chosen before Triton is imported. It
takes its rank from the environment, and prints one JSON row a case.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.fixtures.emoji import write_shards
from tests.virtual_gpu.device import CUDA, VirtualGpu, Wait, virtual_gpu
from tests.virtual_gpu.engine import FORWARD, STEP, PlainEngine
from trainer import loop
from trainer.comm import Comm
from trainer.config import RunConfig, parse_run
from trainer.data.labels import ClusterLabels
from trainer.data.shards import ShardSet
from trainer.engine import zero
from trainer.kernels import triton_assign, triton_logits

KERNELS = {
    triton_logits: ("exponential_product",),
    triton_assign: ("maxima_of_groups", "scores_of_groups"),
}
TOWERS = """
    image_size: 32
    patch_size: 16
    embed_dim: 16
    image: {width: 32, layers: 1, heads: 2}
"""
TEXT = """    text_length: 8
    vocabulary: 300
    text: {width: 32, layers: 1, heads: 2}
"""
RECIPES = {
    "clip": "model:" + TOWERS + TEXT,
    "siglip": "model:" + TOWERS + TEXT,
    "protoclip": "episode_samples: 40\n  clusters: 5\n  model:"
    + TOWERS
    + TEXT
    + "    head: {hidden: 24, dim: 8, norm: batch}\n",
    "mlcd": "labels: FOLDER/labels\n  head: {sample_rate: 0.5}\n  model:" + TOWERS,
}
RUN = """
workdir: {folder}/{case}
steps: 4
global_batch: {batch}
micro_batch: 4
deepspeed: {folder}/zero0.json
recipe:
  name: {name}
  {recipe}
data: {{train: "{spec}", workers: 0}}
log_every: 100 steps
save_every: never
"""


def config_of(case: str, folder: Path, spec: str, world_size: int) -> RunConfig:
    """`case` is a recipe, or a recipe and `/2` for two micro-batches."""
    name, _, passes = case.partition("/")
    text = RUN.format(
        folder=folder,
        case=case.replace("/", "-"),
        batch=4 * world_size * int(passes or 1),
        name=name,
        recipe=RECIPES[name].replace("FOLDER", str(folder)),
        spec=spec,
    )
    return parse_run(text)


def prepare(folder: Path) -> str:
    """Shards, labels and a DeepSpeed file."""
    (folder / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    spec = write_shards(folder / "shards", count=40, per_shard=20)
    ids = torch.as_tensor(ShardSet.open(spec).ids)
    labels = torch.stack([torch.arange(len(ids)) % 300, torch.arange(len(ids)) % 7], dim=1)
    ClusterLabels(ids, labels).save(folder / "labels")
    return spec


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

    def listed(some: list[Wait]) -> dict[str, int]:
        return dict(Counter(f"{w.place} {w.kind}" for w in some if w not in (FORWARD, STEP)))

    return {"before": listed(step[:first]), "all": listed(step)}


def main(folder: str, *cases: str) -> None:
    torch.set_num_threads(1)
    root = Path(folder)
    alone = Comm.from_environment(timeout_seconds=60.0)
    comm = Comm(alone.rank, alone.world_size, CUDA, alone.group, dist.new_group(backend="gloo"))
    spec = alone.broadcast_json(prepare(root) if alone.is_main else "")
    with on_virtual_gpu(comm) as gpu:
        for case in cases:
            gpu.waits.clear()
            outcome = loop.train(config_of(case, root, spec, comm.world_size))
            row = {"case": case, "finished": outcome.finished, **budget_of(gpu.waits)}
            print(json.dumps(row), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main(*sys.argv[1:]))
