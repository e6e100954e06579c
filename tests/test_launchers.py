"""Launchers that end, signals to everybody, and the scripts of launch/."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.data.streams import write_shards
from tests.fixtures.emoji import write_shards as write_emoji
from tests.test_launch import RUN
from trainer.data import workers
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STARTED: list[subprocess.Popen[str]] = []
WATCH = """
import sys, time
from trainer.launchers import Launchers
launchers = Launchers()
print("ready", flush=True)
for _ in range(300):
    if launchers.gone():
        sys.exit(print("gone:", launchers.gone(), flush=True))
    time.sleep(0.1)
"""
READ = """
import sys
from tests.data.streams import open_stream
stream = open_stream(sys.argv[1], workers=2)
print("ready", len(stream.take()), flush=True)
for line in sys.stdin:
    print("batch", len(stream.take()), flush=True)
"""


def started(*command: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, **options.pop("env", {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    while STARTED:
        process = STARTED.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (ROOT / "slurm-4712-last.txt").unlink(missing_ok=True)


def children(pid: int) -> set[int]:
    """All descendants."""
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            child = int(path.parent.name)
            found |= {child} | children(child)
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _state(pid) not in {"", "Z"}}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def until(condition, *, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.1)
    return bool(condition())


def test_a_rank_notices_that_its_launcher_has_ended():
    """The launcher is killed; what it started is asked whether it knows."""
    launcher = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {WATCH!r}])
time.sleep(60)
"""
    process = started(sys.executable, "-c", launcher, "deepspeed")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.stdout.readline().startswith("gone: python")
    process.wait()


def test_readers_survive_a_signal_to_everybody_and_end_with_a_killed_rank(tmp_path):
    spec = write_shards(tmp_path, [40])
    process = started("bash", "-c", f"exec {sys.executable} -c '{READ}' '{spec}'")
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready 1\n"
    readers = children(process.pid)
    assert len(readers) >= 3  # the server and two workers, and what tracks their resources
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for reader in readers:
            os.kill(reader, number)
    for _ in range(8):  # more than was read ahead
        process.stdin.write("next\n")
        process.stdin.flush()
        said = process.stdout.readline()
        assert said == "batch 1\n", said + process.stdout.read()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert until(lambda: not alive(readers), seconds=30)


def test_too_little_shared_memory_is_said_before_anything_waits_for_it():
    with pytest.raises(ConfigError, match=r"/dev/shm has .* MiB free.*--shm-size.*data\.workers"):
        workers.refuse_small_shared_memory(2, batch_bytes=1 << 48, ranks_here=4)
    workers.refuse_small_shared_memory(0, batch_bytes=1 << 48, ranks_here=4)
    workers.refuse_small_shared_memory(2, batch_bytes=1 << 10, ranks_here=2)


def run_file(tmp_path: Path, *, steps: int) -> tuple[Path, Path]:
    spec = write_emoji(tmp_path / "shards", count=64)
    workdir, path = tmp_path / "run", tmp_path / "run.yaml"
    text = RUN.format(workdir=workdir, spec=spec).replace("steps: 4\n", f"steps: {steps}\n")
    path.write_text(text)
    return path, workdir


def logged(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_a_signal_to_the_whole_group_of_a_run_with_readers_saves_it(tmp_path):
    """As a terminal, `docker stop` and launch/local.sh send it."""
    path, workdir = run_file(tmp_path, steps=100000)
    process = started("bash", "launch/local.sh", str(path), "data.workers=1")
    assert until(lambda: logged(workdir) >= 3, seconds=200), process.stdout
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "stopped at step" in said
    assert "Traceback" not in said
    assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.startswith("step-")]


def slurm(
    tmp_path: Path,
    path: Path,
    *,
    fake: str = "",
    state: str = "RUNNING",
    script: str = "launch/slurm.sh",
):
    """A script of launch/ under an srun that leads a process group, and an scontrol that notes."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "srun").write_text(
        f"#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\necho $$ >{tmp_path}/pid\n"
        + (fake or 'exec "$@"')
        + "\n"
    )
    (stubs / "scontrol").write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/scontrol\n'
        '[ "$2" != hostnames ] || echo localhost\n'
        f'[ "$2" != job ] || echo "JobState={state}"\n'
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    environment = {
        "PATH": f"{stubs}:{BIN}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4712",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
    }
    return started("bash", script, str(path), env=environment)


def requeued(tmp_path: Path) -> bool:
    return "requeue 4712" in (tmp_path / "scontrol").read_text().splitlines()


def test_slurms_warning_saves_the_run_and_puts_the_job_back(tmp_path):
    path, workdir = run_file(tmp_path, steps=100000)
    process = slurm(tmp_path, path)
    assert until(lambda: logged(workdir) >= 3, seconds=200)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "stopped at step" in said
    assert requeued(tmp_path)


@pytest.mark.parametrize(
    ("fake", "state", "code", "again"),
    [
        ('echo "stopped at step 3 of 9"; exit 1', "RUNNING", 0, True),
        ('echo "stopped at step 3 of 9"; exit 1', "CANCELLED by 1000", 0, False),
        ('echo "finished 9 steps"', "RUNNING", 0, False),
        ('echo "error: no such shard"; exit 2', "RUNNING", 2, False),
    ],
)
def test_a_slurm_job_goes_back_only_where_it_was_stopped(tmp_path, fake, state, code, again):
    process = slurm(tmp_path, tmp_path / "run.yaml", fake=fake, state=state)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert requeued(tmp_path) == again


@pytest.mark.parametrize(
    ("fake", "state", "code", "again"),
    [
        ('echo "stopped with 3 of 9 cells done"', "RUNNING", 0, True),
        ('echo "stopped with 3 of 9 cells done"', "CANCELLED by 1000", 0, False),
        ('echo "all 9 cells are done"', "RUNNING", 0, False),
        ('echo "error: 1 cells failed"; exit 2', "RUNNING", 2, False),
        ('echo "$@" >&2', "RUNNING", 0, False),
    ],
)
def test_a_task_of_an_array_goes_back_only_where_cells_are_left(tmp_path, fake, state, code, again):
    study = tmp_path / "study.yaml"
    process = slurm(tmp_path, study, fake=fake, state=state, script="launch/slurm_array.sh")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    found = tmp_path / "scontrol"
    assert ("requeue 4712" in found.read_text() if found.exists() else False) == again
    assert "$@" not in fake or f"tools/scaling.py sweep {study}" in said


def test_a_batch_script_that_is_told_to_end_waits_for_its_ranks(tmp_path):
    """Slurm sends SIGTERM to the script too; `set -e` must not end it before the ranks have."""
    fake = 'trap "echo stopped at step 3 of 9; exit 1" TERM\necho up\nwhile :; do sleep 0.1; done'
    process = slurm(tmp_path, tmp_path / "run.yaml", fake=fake)
    assert process.stdout is not None
    assert until(lambda: (tmp_path / "pid").exists(), seconds=30)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert requeued(tmp_path)


def test_a_hostfile_that_is_missing_or_empty_is_refused(tmp_path):
    (tmp_path / "empty").write_text("# nobody\n")
    for name in ("missing", "empty"):
        process = started(
            "bash", "launch/multinode.sh", str(tmp_path / name), "launch/runs/clip.yaml"
        )
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2, said
        assert f"hostfile {tmp_path / name}" in said


@pytest.mark.skipif(
    not (shutil.which("ssh") and shutil.which("pdsh")), reason="ssh or pdsh is not installed"
)
def test_hosts_that_no_ssh_reaches_are_named(tmp_path):
    """With the code of a lost host: it may be starting, so a start anew makes sense."""
    (tmp_path / "hosts").write_text("# two\nno-host-a.invalid slots=8\nno-host-b.invalid slots=8\n")
    process = started(
        "bash", "launch/multinode.sh", str(tmp_path / "hosts"), "launch/runs/clip.yaml"
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 3, said
    assert "to: no-host-a.invalid no-host-b.invalid; set up keys" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [([3, 1, 0], 0, 3), ([3, 2, 0], 2, 2), ([3, 3, 3, 3], 3, 3)],
)
def test_a_run_is_started_again_until_it_is_done_or_wrong(tmp_path, codes, code, starts):
    """Not more often than asked for, and not where a start anew would meet the same mistake."""
    (tmp_path / "codes").write_text("".join(f"{each}\n" for each in codes))
    take = f"echo >>{tmp_path}/starts; c=$(head -1 {tmp_path}/codes)"
    script = f"{take}; sed -i 1d {tmp_path}/codes; exit $c"
    process = started(
        *("bash", "launch/until_done.sh", "2", "bash", "-c", script), env={"PAUSE_SECONDS": "0"}
    )
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert len((tmp_path / "starts").read_text().splitlines()) == starts


def test_the_pods_of_the_manifest_can_save_and_have_shared_memory():
    """Its fields are those that docs/distributed.md asks for; every pod is like the first."""
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for pods in replicas.values():
        assert pods["restartPolicy"] == "OnFailure"
        pod = pods["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it
        words = container["command"][2].split()
        patience = int(words[words.index("--shutdown-timeout") + 1])
        assert patience < pod["terminationGracePeriodSeconds"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes.keys() == mounted.keys()
        assert mounted["memory"] == "/dev/shm"
        assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
