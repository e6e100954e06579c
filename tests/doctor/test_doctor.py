"""Faults are planted one by one; each is found, and nothing is said of what is well."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.emoji import write_shards
from tests.test_launch import RUN
from trainer.doctor import machine as machine_module
from trainer.doctor import run as run_module
from trainer.doctor.finding import Finding
from trainer.doctor.machine import machine
from trainer.doctor.main import doctor
from trainer.doctor.run import run_file

ROOT = Path(__file__).parents[2]
EVALUATION = "{name: zero_shot, label: x, data: no.tar, target: name}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards and a run file that are well, and an environment without a launcher."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    spec = write_shards(tmp_path / "shards", count=24, per_shard=12)
    (tmp_path / "run.yaml").write_text(RUN.format(workdir=tmp_path / "run", spec=spec))
    return tmp_path


def wrong(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.about: finding.wrong for finding in findings if finding.wrong}


def of_run(folder: Path, *overrides: str, ranks: int = 2) -> dict[str, str]:
    return wrong(run_file(str(folder / "run.yaml"), overrides, ranks=ranks))


def test_where_all_is_well_nothing_is_said_and_nothing_is_left(folder):
    assert of_run(folder) == {}
    assert not (folder / "run").exists()


def requirements(folder: Path, *lines: str) -> Path:
    path = folder / "requirements.txt"
    path.write_text("\n".join([*lines, "", "# Tests", "nothing==1"]))
    return path


def test_packages_that_are_missing_or_others(folder):
    path = requirements(folder, "no-such-package-here==1.0", "numpy==0.0.1")
    found = wrong(machine(requirements=path))
    assert "no-such-package-here not installed; pip install" in found["packages"]
    assert "instead of 0.0.1" in found["package versions"]


def stub(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


def test_no_compiler_and_gpus_that_torch_does_not_see(folder, monkeypatch):
    monkeypatch.setattr(machine_module.torch.cuda, "device_count", lambda: 0)
    stub(folder, "nvidia-smi", "echo 'GPU 0: one'")
    monkeypatch.setenv("PATH", f"{folder}/bin")
    found = wrong(machine())
    assert "apt-get install g++" in found["compiler"]
    assert "nvidia-smi sees GPUs, torch sees none" in found["devices"]


@pytest.mark.parametrize(
    ("limit", "value", "about"),
    [
        (resource.RLIMIT_NOFILE, 512, "descriptors"),
        (resource.RLIMIT_FSIZE, 1 << 20, "file size"),
        (resource.RLIMIT_NPROC, 200, "processes"),
    ],
)
def test_limits_that_are_too_low(folder, limit, value, about):
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, hard))
    try:
        found = wrong(machine())
    finally:
        resource.setrlimit(limit, (soft, hard))
    assert "ulimit" in found[about]


@pytest.mark.parametrize(
    ("environment", "about", "sentence"),
    [
        ({"RANK": "1"}, "launcher", "WORLD_SIZE is not set"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no.invalid", "MASTER_PORT": "29500"},
            "launcher",
            "no known host",
        ),
        ({"OMP_NUM_THREADS": "64", "LOCAL_WORLD_SIZE": "64"}, "threads", "lower it"),
        ({"PYTHONDONTWRITEBYTECODE": "1"}, "bytecode", "unset it"),
        ({"TMPDIR": "/no/such/folder"}, "scratch", "unset it"),
    ],
)
def test_an_environment_that_is_wrong(folder, monkeypatch, environment, about, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sentence in wrong(machine())[about]


def test_a_port_that_is_taken(folder, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", port)
        assert f"port {port} (MASTER_PORT) is taken" in wrong(machine())["launcher"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("override", "about", "sentence"),
    [
        ("stepz=4", "run file", "steps"),
        ("global_batch=7", "batch", "use 6 or 8"),
        ("deepspeed=no.json", "deepspeed", "no.json"),
        ("data.train=no/such-{0..3}.tar", "shards", "no/such"),
        ("data.captions={fields: [caption]}", "shards", "caption"),
        (
            "evals=[{name: zero_shot, label: x, data: no.tar, target: name}]",
            "evaluations",
            "no.tar",
        ),
        ("data.max_pixels=4", "samples", "pixels"),
        ("wandb=project", "tracker", "pip install wandb"),
    ],
)
def test_a_run_file_with_a_mistake(folder, monkeypatch, override, about, sentence):
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    found = of_run(folder, override)
    assert sentence in found[about], found


def cut(folder: Path) -> None:
    shard = next((folder / "shards").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)


def no_index(folder: Path) -> None:
    next((folder / "shards").glob("*.index")).unlink()


def no_folder(folder: Path) -> None:
    (folder / "run").write_text("a file where the workdir is to be")


@pytest.mark.parametrize(
    ("plant", "about"), [(cut, "shards"), (no_index, "shards"), (no_folder, "workdir")]
)
def test_files_that_are_broken(folder, plant: Callable[[Path], None], about):
    plant(folder)
    assert about in of_run(folder)


def test_shared_memory_and_disk_that_are_too_small(folder, monkeypatch):
    few = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("trainer.data.workers.shutil.disk_usage", lambda path: few)
    found = of_run(folder, "data.workers=2")
    assert "/dev/shm" in found["shards"]
    assert "are free" in found["workdir"]
    assert "make room" in of_run(folder)["disk"]


def test_a_workdir_that_another_run_holds(folder):
    (folder / "run").mkdir()
    with (folder / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is using" in of_run(folder)["workdir"]


def test_checkpoints_that_are_damaged_or_of_another_run(folder):
    command = [sys.executable, "-m", "trainer", str(folder / "run.yaml")]
    small = ("steps=2", "save_every=1 steps", "evals=[]")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert of_run(folder) == {}
    assert "seed: 0 -> 7" in of_run(folder, "seed=7")["the same run"]
    newest = max((folder / "run/checkpoints").glob("step-*"))
    weights = next(newest.glob("weights*"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    found = of_run(folder)["checkpoints"]
    assert "SHA-256" in found
    assert "go on from step 1" in found
    shutil.rmtree(min((folder / "run/checkpoints").glob("step-*")))
    assert "restore a copy" in of_run(folder)["checkpoints"]


@pytest.mark.parametrize(
    ("said", "about"),
    [("TimeLimit=00:05:00 Requeue=1", "time limit"), ("TimeLimit=2-00:00:00 Requeue=0", "requeue")],
)
def test_a_job_that_ends_before_it_saves_or_does_not_come_back(folder, monkeypatch, said, about):
    stub(folder, "scontrol", f"echo 'JobId=1 {said}'")
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert about in of_run(folder)


def test_a_disk_whose_clock_is_another(folder, monkeypatch):
    now = run_module.time.time
    monkeypatch.setattr(run_module.time, "time", lambda: now() + 500)
    assert "set both by ntp" in of_run(folder)["clock"]


def test_the_command_prints_a_line_each_and_tells_by_its_code(folder, capsys):
    assert doctor([str(folder / "run.yaml"), "--ranks", "2"]) == 0
    assert doctor([str(folder / "run.yaml"), "global_batch=7", "--ranks", "2"]) == 2
    said = capsys.readouterr().out
    assert "WRONG batch: global_batch 7 is not divisible" in said
    assert "1 to mend" in said
