"""The machine: Python, packages, compiler, devices, limits, what launchers and schedulers say."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch

from trainer.doctor.finding import Finding, looked_at
from trainer.errors import ConfigError
from trainer.launchers import refuse_missing_hostfile
from trainer.log.environment import ROOT
from trainer.meeting import Place, read_place

OPEN_FILES = 1024
"""Descriptors that a rank with workers and shards may need."""
INSTALL = "pip install -r requirements.txt"


def machine(*, requirements: Path = ROOT / "requirements.txt") -> Iterator[Finding]:
    """Everything that can be looked at without a run file."""
    yield _python()
    yield from _packages(requirements)
    yield _compiler()
    yield from _devices()
    yield from _limits()
    yield from _environment(os.environ)
    yield _scratch()


def _python() -> Finding:
    said = ".".join(map(str, sys.version_info[:3]))
    wrong = "" if sys.version_info >= (3, 11) else f"{said}; Python 3.11 or newer is needed"
    return Finding("python", wrong, said)


def _packages(requirements: Path) -> Iterator[Finding]:
    """Those of the core; tests and other platforms stand behind them or carry conditions."""
    wanted = requirements.read_text().partition("# Tests")[0]
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.+-]+)\s*$", wanted, re.M))
    missing, others = [], []
    for name, version in pinned.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.partition("+")[0] != version:
            others.append(f"{name} {found} instead of {version}")
    if missing:
        yield Finding("packages", f"{', '.join(missing)} not installed; {INSTALL}")
    if others:
        yield Finding(
            "package versions", f"{', '.join(others)}, which was tried; {INSTALL}", blocks=False
        )
    if not missing and not others:
        yield Finding("packages", said=f"{len(pinned)} as in {requirements.name}")


def _compiler() -> Finding:
    found = shutil.which("g++") or shutil.which("c++")
    wrong = "no C++ compiler; DeepSpeed may build its optimizers (apt-get install g++)"
    return Finding("compiler", "" if found else wrong, found or "", blocks=False)


def _devices() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    wrong = ""
    if not count and _gpus_there():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = (
            f"CUDA_VISIBLE_DEVICES is {hidden!r}; unset it"
            if hidden is not None and torch.version.cuda
            else f"torch {torch.__version__} was built without CUDA; install the build for your "
            "driver"
            if not torch.version.cuda
            else "the driver does not fit torch's CUDA; look at nvidia-smi"
        )
        wrong = f"nvidia-smi sees GPUs, torch sees none: {why}"
    yield Finding("devices", wrong, ", ".join(names) or "no GPU; ranks run on the CPU")


def _gpus_there() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def _limits() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wrong = f"{soft} may be open at once, and {OPEN_FILES} are needed; ulimit -n {OPEN_FILES}"
    yield Finding("descriptors", wrong if 0 <= soft < OPEN_FILES else "", str(soft))
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    wrong = f"files may be {soft} bytes at most, less than a checkpoint has; ulimit -f unlimited"
    yield Finding("file size", wrong if soft >= 0 else "", "unlimited")
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    wrong = f"{soft} processes and threads may run at once; ulimit -u 4096"
    yield Finding("processes", wrong if 0 <= soft < 256 else "", "enough")


def _environment(given: Mapping[str, str]) -> Iterator[Finding]:
    yield looked_at("launcher", lambda: _place(read_place(given)))
    yield looked_at("hostfile", lambda: refuse_missing_hostfile())
    threads = given.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    local = given.get("LOCAL_WORLD_SIZE") or given.get("LOCAL_SIZE") or "1"
    if threads.isdigit() and local.isdigit() and int(threads) * int(local) > (cores or 1):
        yield Finding(
            "threads",
            f"{local} ranks of OMP_NUM_THREADS={threads} share {cores} cores; lower it",
            blocks=False,
        )
    if given.get("PYTHONDONTWRITEBYTECODE"):
        yield Finding(
            "bytecode",
            "PYTHONDONTWRITEBYTECODE is set, so that every rank compiles all packages at every "
            "start; unset it",
            blocks=False,
        )


def _place(place: Place) -> str:
    """What an environment says, where it can be so."""
    if place.world_size == 1:
        return "one rank"
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {place.address!r} is no known host: {error}") from error
    if place.rank == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", place.port))
            except OSError as error:
                raise ConfigError(
                    f"port {place.port} (MASTER_PORT) is taken on this host; choose another one"
                ) from error
    return f"rank {place.rank} of {place.world_size}"


def _scratch() -> Finding:
    folder = Path(os.environ.get("TMPDIR") or "/tmp")
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    wrong = f"TMPDIR is {folder}, where nothing can be written; unset it or make the folder"
    return Finding("scratch", "" if writable else wrong, str(folder))
