"""The same run starts with every launcher, and the tools read what it left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.emoji import write_shards

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RUN = """
workdir: {workdir}
steps: 4
global_batch: 8
recipe:
  name: protoclip
  episode_samples: 16
  clusters: 4
  model:
    image_size: 32
    patch_size: 16
    text_length: 8
    vocabulary: 300
    embed_dim: 16
    image: {{width: 32, layers: 1, heads: 2}}
    text: {{width: 32, layers: 1, heads: 2}}
    head: {{hidden: 24, dim: 8}}
data: {{train: "{spec}"}}
evals: [{{name: zero_shot, label: names, data: "{spec}", target: name}}]
log_every: 1 steps
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["values"]["loss"] for line in lines]


def test_deepspeed_torchrun_accelerate_and_python_train_alike_and_the_tools_read_it(tmp_path):
    spec = write_shards(tmp_path / "shards", count=24, per_shard=12)
    launchers = {
        "deepspeed": ("deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module"),
        "torchrun": ("torchrun", "--nproc_per_node", "2", "--master_port", free_port(), "-m"),
        "accelerate": ("accelerate", "launch", "--cpu", "-m"),
        "python": (sys.executable, "-m"),
    }
    found = {}
    for name, command in launchers.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(RUN.format(workdir=tmp_path / name, spec=spec))
        result = launched(*command, "trainer", str(path))
        assert result.returncode == 0, f"{name}: {result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        found[name] = losses(tmp_path / name)
        assert len(found[name]) == 4
    for name, values in found.items():
        assert values == pytest.approx(found["python"], rel=2e-3), name

    workdir = str(tmp_path / "deepspeed")
    for tool in ("export", "pictures", "evaluate"):
        result = launched(sys.executable, f"tools/{tool}.py", workdir)
        assert result.returncode == 0, f"{tool}: {result.stderr[-4000:]}"
    assert "top1" in result.stdout
    assert (tmp_path / "deepspeed/pictures/retrieval.png").stat().st_size > 1000
    assert (tmp_path / "deepspeed/pictures/clusters.html").exists()
    from transformers import CLIPModel

    assert CLIPModel.from_pretrained(tmp_path / "deepspeed/export").config.projection_dim == 16
