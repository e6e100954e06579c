"""Runs over several hosts, by the launcher and the script that a user starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.virtual import Hosts, missing
from tests.test_launch import losses
from tests.watch.runs import Ranks, run_file, until_logged

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
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


def ended(process: subprocess.Popen[str], *, seconds: float = 200.0) -> str:
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
def test_three_hosts_and_one_of_them_lost_then_two_go_on(hosts, tmp_path):
    path = run_file(tmp_path, steps=300)
    keys = ("save_every=1 steps", "evals=[]", "hang_seconds=30", "global_batch=12")
    process = started(hosts, hosts.names, path, *keys)
    until_logged(tmp_path / "run", 4)
    hosts.unplug("host3")
    said = ended(process)
    assert "error: rank 2 on host3 " in said
    assert process.returncode != 0
    process = started(hosts, hosts.names[:2], path, *keys, "steps=8")
    said = ended(process)
    assert process.returncode == 0, said
    assert "going on from step" in said
