"""docs/extending.md builds a method: what it shows is written to files and trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.fixtures.emoji import write_shards

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SMALL = {
    "steps": 3,
    "global_batch": 32,
    "gradient_checkpointing": True,
    "log_every": "1 steps",
    "save_every": "never",
}
TOWERS = {
    "preset": "tiny",
    "image_size": 32,
    "embed_dim": 16,
    "image": {"width": 32, "layers": 2, "heads": 2},
    "text": {"width": 32, "layers": 1, "heads": 2},
}


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The program with the page's file in it, and nothing else changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("trainer", "ds_configs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "trainer" / "recipes" / "slip.py").write_text(block("python"))
    write_shards(folder / "shards")
    return folder


def shards(checkout: Path) -> str:
    return str(checkout / "shards" / "*.tar")


def trained(checkout: Path, label: str, world_size: int, **changes: object) -> list[dict]:
    """Every step's logged values of a run of the page's run file, made small."""
    run = yaml.safe_load(block("yaml"))
    run |= {**SMALL, "workdir": str(checkout / label), **changes}
    run["data"] = {"train": shards(checkout)}
    (checkout / f"{label}.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run(
        [*command, "-m", "trainer", f"{label}.yaml"],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (checkout / label / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["values"] for line in lines]


def test_the_method_of_the_page_takes_the_same_steps_on_one_rank_and_on_two(checkout):
    head = {"layers": 1, "hidden": 32, "dim": 8, "norm": "layer"}
    recipe = {"name": "slip", "model": TOWERS, "head": head}
    alone = trained(checkout, "one", 1, recipe=recipe)
    evals = [{"name": "zero_shot", "label": "names", "data": shards(checkout), "target": "name"}]
    shared = trained(checkout, "two", 2, recipe=recipe, micro_batch=8, evals=evals)
    plain = trained(checkout, "clip", 1, recipe={"name": "clip", "model": TOWERS})

    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared, strict=True):
        assert two["clip"] == pytest.approx(one["clip"], rel=2e-5)
        assert two["simclr"] == pytest.approx(one["simclr"], rel=2e-5)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-4)
    assert alone[0]["clip"] == pytest.approx(plain[0]["clip"], rel=1e-6)
    assert alone[0]["loss"] == pytest.approx(alone[0]["clip"] + alone[0]["simclr"], rel=1e-6)
    # 64 views: a random guess among the 63 others costs 4.14 nats.
    assert 3.0 < alone[0]["simclr"] < 6.0
    assert alone[-1]["loss"] != alone[0]["loss"]

    tool = [sys.executable, "tools/evaluate.py", str(checkout / "two")]
    evaluated = subprocess.run(tool, cwd=checkout, capture_output=True, text=True)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "names" in evaluated.stdout


def test_the_pages_code_is_in_the_style_of_the_house(checkout):
    recipe = "trainer/recipes/slip.py"
    settings = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *settings, recipe]
        done = subprocess.run(ruff, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = block("python").splitlines()
    assert len(lines) < 120
