"""What a run was started from: `run.yaml` and `environment.json` in its workdir.

`run.yaml` is the resolved configuration of the last start. `environment.json` is a list of all
starts, the last one at its end: command line, commit, versions of packages, machine.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from trainer.addresses import all_without_secrets
from trainer.comm import Comm
from trainer.config import RunConfig, dump_run
from trainer.store.header import write_whole

RUN, ENVIRONMENT = "run.yaml", "environment.json"
ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "triton", "deepspeed", "transformers", "tokenizers", "safetensors", "accelerate"),
    *("peft", "faiss-cpu", "faiss-gpu", "webdataset", "fsspec", "pillow", "kornia", "numpy"),
    *("pydantic", "PyYAML", "tensorboard", "wandb"),
)


def write_start(config: RunConfig, comm: Comm, *, step: int) -> None:
    """Write both files, on rank 0. Every rank calls it: each host says what it is.

    A full disk is told and stops nothing.
    """
    hosts = comm.gather_json(this_host(comm))
    if comm.is_main:
        try:
            _write(config, comm, step, hosts)
        except OSError as error:
            sys.stderr.write(f"can't write {config.workdir / ENVIRONMENT}: {error.strerror}\n")


def pages_of_start(workdir: Path) -> dict[str, str]:
    """Both files as Markdown, of the last start, by a name for each; none where they are not."""
    pages = {}
    try:
        pages["configuration"] = _as_code("yaml", (workdir / RUN).read_text())
        start = json.loads((workdir / ENVIRONMENT).read_text())[-1]
        pages["start"] = _as_code("json", json.dumps(start, indent=2))
    except (OSError, ValueError, LookupError):
        return pages
    return pages


def _as_code(language: str, text: str) -> str:
    """Fenced by more backticks in a row than the text has, so that it can't end the fence."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _write(config: RunConfig, comm: Comm, step: int, hosts: list[Any]) -> None:
    config.workdir.mkdir(parents=True, exist_ok=True)
    write_whole(config.workdir / RUN, dump_run(config, secrets=False).encode())
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "command": all_without_secrets(sys.argv),
        "folder": str(Path.cwd()),
        **commit_of(ROOT),
        "python": platform.python_version(),
        "packages": versions(),
        "ranks": comm.world_size,
        "hosts": [host for number, host in enumerate(hosts) if host not in hosts[:number]],
    }
    path = config.workdir / ENVIRONMENT
    write_whole(path, json.dumps([*_starts(path), start], indent=2).encode() + b"\n")


def this_host(comm: Comm) -> dict[str, Any]:
    """Name, system, cores, memory and devices of the machine that this rank runs on."""
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
        "device": _device_name(comm.device),
        "cuda": torch.version.cuda if comm.device.type == "cuda" else None,
    }


def commit_of(root: Path) -> dict[str, Any]:
    """`commit` and `dirty` (files that differ from it) of a checkout; None where it is none."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def versions() -> dict[str, str]:
    """Of the packages that decide what a run does, those that are installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _starts(path: Path) -> list[Any]:
    """Those written so far; a file that can't be read counts as none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"
