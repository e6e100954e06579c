"""Runs over several hosts, by the launcher and the script that a user starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.hosts.virtual import Hosts, missing
from tests.test_launch import losses
from tests.watch.runs import Ranks, run_file, until_logged

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
THREE = ("global_batch=12", "evals=[]")
LONG = (*THREE, "save_every=2 steps", "hang_seconds=40")
pytestmark = [pytest.mark.heavy, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("network") / "of_hosts", 3) as hosts:
        yield hosts


def started(hosts: Hosts, names: list[str], path: Path, *overrides: str) -> subprocess.Popen[str]:
    """launch/multinode.sh on the first host, with a slot on each of `names`."""
    hostfile = path.parent / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    script = ("bash", "launch/multinode.sh", str(hostfile), str(path), *overrides)
    return subprocess.Popen(
        hosts.command(names[0], *script),
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}:/usr/sbin:/sbin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], *, seconds: float = 500.0) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def test_two_hosts_train_as_two_ranks_of_one_host_do(hosts, tmp_path):
    path = run_file(tmp_path, steps=4)
    process = started(hosts, hosts.names[:2], path)
    said = ended(process)
    assert process.returncode == 0, said
    assert "host2" in said
    found = losses(tmp_path / "run")
    with Ranks(path, 2, f"workdir={tmp_path}/one_host") as ranks:
        assert "finished 4 steps" in ranks.said(0)
    assert found == losses(tmp_path / "one_host")
    assert len(found) == 4


def test_a_folder_that_one_host_has_not_mounted_ends_all_by_one_sentence(hosts, tmp_path):
    path = run_file(tmp_path, steps=4)
    hosts.hide("host2", tmp_path / "shards")
    process = started(hosts, hosts.names[:2], path)
    said = ended(process)
    assert process.returncode != 0
    sentences = [line for line in said.splitlines() if "error: " in line]
    assert len(sentences) == 1, said
    assert "rank 1 on host2: " in sentences[0]
    assert f"{tmp_path}/shards" in sentences[0]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["protoclip", "mlcd"])
def test_three_hosts_train_as_three_ranks_of_one_host_do(hosts, tmp_path, recipe):
    path = run_file(tmp_path, steps=4)
    if recipe == "mlcd":
        as_mlcd(path)
    process = started(hosts, hosts.names, path, *THREE)
    said = ended(process)
    assert process.returncode == 0, said
    assert "host3" in said
    with Ranks(path, 3, *THREE, f"workdir={tmp_path}/one_host") as ranks:
        assert "finished 4 steps" in ranks.said(0)
    found = losses(tmp_path / "run")
    assert found == losses(tmp_path / "one_host")
    assert len(found) == 4


def as_mlcd(path: Path) -> None:
    """The same data, with the drawings' classes."""
    values = yaml.safe_load(path.read_text())
    size = {"image_size": 32, "patch_size": 16, "embed_dim": 16}
    model = {**size, "image": {"width": 32, "layers": 1, "heads": 2}}
    head = {"sample_rate": 0.5}
    values["recipe"] = {"name": "mlcd", "classes": ["subgroup"], "head": head, "model": model}
    path.write_text(yaml.safe_dump({**values, "evals": []}))


def struck(hosts: Hosts, tmp_path: Path, path: Path, strike: Callable[[], None]) -> float:
    """Seconds from a strike in a run over three hosts until its launcher and all ranks ended."""
    process = started(hosts, hosts.names, path, *LONG)
    log = tmp_path / "run/metrics.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    until_logged(tmp_path / "run", before + 3)
    strike()
    began = time.monotonic()
    said = ended(process, seconds=500.0)
    took = time.monotonic() - began
    assert process.returncode != 0, said
    assert "error: " in said, said
    (tmp_path / "said.txt").write_text(said)
    return took


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hosts_are_struck_again_and_again_and_two_bring_the_run_to_its_end(hosts, tmp_path):
    path = run_file(tmp_path, steps=60)
    took, sentences = {}, {}

    def strike(name: str, what: Callable[[], None]) -> None:
        took[name] = round(struck(hosts, tmp_path, path, what), 1)
        lines = (tmp_path / "said.txt").read_text().splitlines()
        sentences[name] = next(line for line in lines if "error: " in line)

    def in_save() -> None:
        end = time.monotonic() + 60
        while not list((tmp_path / "run/checkpoints").glob(".saving-*")):
            assert time.monotonic() < end
            time.sleep(0.002)
        hosts.unplug("host3")

    strike("SIGKILL of a remote rank", lambda: hosts.signal("host3", "KILL", hosts.rank("host3")))

    def stop() -> None:
        """Its launcher waits for it for ever, so somebody must end it once it is named."""
        pid = hosts.rank("host2")
        hosts.signal("host2", "STOP", pid)
        end = time.monotonic() + 200
        while "on host2 ended without a word, stands" not in (tmp_path / "run/log.txt").read_text():
            assert time.monotonic() < end
            time.sleep(0.2)
        hosts.signal("host2", "KILL", pid)

    strike("SIGSTOP of a remote rank", stop)
    strike("link down in a step", lambda: hosts.unplug("host2"))
    hosts.plug_in("host2")
    strike("link down in a save", in_save)
    print(took, sentences)
    for name, host in zip(sentences, ("host3", "host2", "host2", "host3"), strict=True):
        assert f" on {host} " in sentences[name], sentences
    process = started(hosts, hosts.names[:2], path, *LONG)
    said = ended(process, seconds=500.0)
    hosts.plug_in("host3")
    assert process.returncode == 0, said
    assert "going on from step" in said
    with Ranks(path, 3, *LONG, f"workdir={tmp_path}/whole") as ranks:
        assert "finished 60 steps" in ranks.said(0, seconds=500.0)
    found, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert len(found) == len(whole) == 60
    assert found == pytest.approx(whole, rel=1e-3)  # other samples would be off by far more


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.xfail(reason="the first agent takes a rank that saved and ended for a finished one")
def test_torchrun_starts_the_ranks_of_two_hosts_again(hosts, tmp_path):
    path = run_file(tmp_path, steps=40)
    keys = ("save_every=2 steps", "evals=[]", "hang_seconds=60")

    def agent(number: int) -> subprocess.Popen[str]:
        words = ("--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1")
        where = ("--master_addr", "host1", "--master_port", "29611", "--max-restarts", "3")
        command = (f"{BIN}/torchrun", *words, *where, "-m", "trainer", str(path), *keys)
        return subprocess.Popen(
            hosts.command(hosts.names[number], *command),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    agents = [agent(0), agent(1)]
    until_logged(tmp_path / "run", 4)
    hosts.signal("host2", "KILL", hosts.rank("host2"))
    said = [ended(each, seconds=400.0) for each in agents]
    print("\n=====\n".join(text[-2500:] for text in said))
    assert [each.returncode for each in agents] == [0, 0]
    assert "going on from step" in said[0]
    assert "finished 40 steps" in said[0]
