"""A mistake that only one host has ends all ranks, within seconds and by one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.fixtures.emoji import write_shards
from tests.ranks import run_ranks
from tests.test_launch import RUN, free_port
from trainer.comm import Comm
from trainer.errors import DataError, TrainerError
from trainer.log.facts import code_of
from trainer.together import Facts, prepared_together

ROOT = Path(__file__).parents[1]
FAILING = {
    "ready": {},
    "rank 0": {0: DataError("no such shard")},
    "rank 1": {1: DataError("no such shard")},
    "all": dict.fromkeys(range(3), DataError("no such shard")),
    "two": {0: DataError("one"), 2: DataError("other")},
    "ours": {1: ValueError("a bug")},
    "versions": {},
}


def agreeing(comm: Comm, ports: dict[str, str]) -> dict[str, Any]:
    found = {}
    for case, port in ports.items():
        os.environ["MASTER_PORT"] = port
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                end: Any = prepared_together(lambda case=case: prepared(comm.rank, case))
        except TrainerError as error:
            end = error.is_said
        except ValueError as error:
            end = error
        found[case] = (end, said.getvalue())
    return found


def prepared(rank: int, case: str) -> tuple[str, list[Facts]]:
    if rank in FAILING[case]:
        raise FAILING[case][rank]
    versions = {"torch": "2"} | (
        {"torch": "3", "extra": "1"} if (case, rank) == ("versions", 1) else {}
    )
    return "ready", [Facts("package", "install it", versions)]


def test_ranks_that_are_ready_agree_or_end_together_by_one_sentence():
    found = run_ranks(agreeing, 3, {case: free_port() for case in FAILING})
    assert [rank["ready"] for rank in found] == [("ready", "")] * 3
    for case in ("rank 0", "rank 1", "all", "two", "versions"):
        assert [rank[case][0] for rank in found] == [True] * 3, case
    assert [rank["ours"][0] for rank in found[::2]] == [True] * 2
    assert str(found[1]["ours"][0]) == "a bug"  # with its traceback
    for rank in found[1:]:
        assert {said for _, said in rank.values()} == {""}
    host = os.uname().nodename
    said = {case: text for case, (_, text) in found[0].items()}
    assert said["rank 0"] == f"error: rank 0 on {host}: no such shard\n"
    assert said["rank 1"] == f"error: rank 1 on {host}: no such shard\n"
    assert said["all"] == "error: no such shard\n"
    assert said["two"] == f"error: rank 0 on {host}: one; rank 2 on {host}: other\n"
    assert said["ours"] == f"error: rank 1 on {host}: ValueError: a bug\n"
    assert said["versions"] == (
        f"error: rank 1 on {host}: package extra is 1 here and missing on rank 0 ({host}), "
        f"package torch is 3 here and 2 on rank 0 ({host}); install it\n"
    )


def test_a_run_whose_hosts_have_different_code_ends_before_it_begins(tmp_path):
    """And its code is known by the files."""
    assert {"trainer/loop.py", "trainer/__main__.py"} <= code_of(ROOT).keys()
    assert len(set(code_of(ROOT).values())) > 200
    spec = write_shards(tmp_path / "shards", count=16, per_shard=8)
    other = tmp_path / "other"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "trainer", other / "trainer", ignore=ignored)
    with (other / "trainer/loop.py").open("a") as file:
        file.write("# another version\n")
    shutil.copytree(ROOT / "ds_configs", other / "ds_configs")
    run = tmp_path / "run.yaml"
    run.write_text(RUN.format(workdir=tmp_path / "run", spec=spec))
    ends = ends_of_ranks(run, folders=(ROOT, other))
    assert [code for code, _ in ends] == [2, 2], ends
    assert f"error: rank 1 on {os.uname().nodename}: code trainer/loop.py is " in ends[0][1]
    assert "error" not in ends[1][1]
    assert not (tmp_path / "run").exists()


def ends_of_ranks(run: Path, *, folders: tuple[Path, ...]) -> list[tuple[int, str]]:
    """Exit code and output of a rank started in each folder, as another host would start it."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", str(run)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(folder),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(len(folders)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
