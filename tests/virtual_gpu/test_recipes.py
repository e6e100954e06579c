"""Recipes on a pretended GPU, over two ranks: no mix of devices, and few waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port

pytest.importorskip("triton", reason="Triton's wheel is for Linux")
ROOT = Path(__file__).parents[2]

FINITE = {"trainer/engine/zero.py _local_scalar_dense": 1}
"""Stage 0 looks whether the gradient is finite. ZeRO's other stages wait as often of themselves."""
ROWS_FINITE = FINITE | {"trainer/parts/prototype_head.py tolist": 1}
"""So does a head whether its own is."""
HEAD = ROWS_FINITE | {"trainer/parts/sampling.py nonzero": 2}
"""How many rows are drawn, and how many are positives."""
OF_GLOO = "trainer/adjoints.py copy to the device"
"""Gloo's sum that is dealt out copies in C++, from where no tag is seen; NCCL's does not."""
BUDGET = {
    "mlcd/2": HEAD,
    "protoclip/2": FINITE,
    "clip": FINITE,
    "siglip": FINITE,
    "palm": FINITE,
    "supcon": FINITE,
    "flame": FINITE,
    "aclip": FINITE,
    "tinyclip": FINITE,
    "superclass": ROWS_FINITE,
    "codebook": FINITE,
    # transformers asks of positions that it has made itself whether several texts share a row
    "lexvla": FINITE | {"trainer/models/tower.py _local_scalar_dense": 1},
    "slots": HEAD | {"trainer/parts/prototype_head.py _unique2": 2},
}
"""Waits of a whole step by file, whatever its number of micro-batches (`/2`: two)."""
MORE = {
    "superclip": ROWS_FINITE,
    "unicom": ROWS_FINITE,
    "rice": ROWS_FINITE,
    "partial_fc": ROWS_FINITE | {"trainer/parts/sampling.py nonzero": 1},
    "distilled": HEAD,
}
"""Settings of these, and other terms on the same towers."""
TOOLS = {"evaluated": 4800, "embedded": 200, "clustered": 2200}
"""Waits of a whole program at most. Of evaluations most are in L-BFGS, which is torch's own and
looks at its numbers on the host; of a clustering most are a few for each block of points."""


def rows_of(folder: Path, cases: Sequence[str], world_size: int) -> list[list[dict[str, Any]]]:
    """What each rank prints of each case."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.virtual_gpu.run", str(folder), *cases],
            cwd=ROOT,
            env={
                **os.environ,
                "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [rank.communicate(timeout=900) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    rows = [[json.loads(line) for line in out.splitlines() if line[0] == "{"] for out, _ in said]
    for rank in rows:
        assert [row["case"] for row in rank] == list(cases)
        for row in rank:
            assert "failed" not in row, row["failed"]
            assert row["finished"], row
    return rows


@pytest.mark.heavy
@pytest.mark.parametrize("budget", [BUDGET, pytest.param(MORE, marks=pytest.mark.slow)])
def test_steps_mix_no_devices_and_wait_no_more_than_their_budget(
    tmp_path: Path, budget: dict[str, dict[str, int]]
) -> None:
    """Training, episodes, gates and the run's own collectives; nothing waits before the first
    forward pass, so that the device is never without work while a batch is made ready."""
    for rank in rows_of(tmp_path, list(budget), 2):
        for row in rank:
            assert row["before"] == {}, row
            assert by_file(row["all"]) == budget[row["case"]], row


@pytest.mark.heavy
@pytest.mark.parametrize(
    "programs", [("evaluated", "embedded"), pytest.param(tuple(TOOLS), marks=pytest.mark.slow)]
)
def test_evaluations_going_on_and_tools_mix_no_devices(
    tmp_path: Path, programs: tuple[str, ...]
) -> None:
    """Every evaluation, a run that goes on, vectors and their components, three clusterings."""
    for rank in rows_of(tmp_path, programs, 2):
        for row in rank:
            assert sum(row["all"].values()) <= TOOLS[row["case"]], row


def by_file(waits: dict[str, int]) -> dict[str, int]:
    """Without line numbers, which every edit moves."""
    found: Counter[str] = Counter()
    for wait, count in waits.items():
        place, _, kind = wait.partition(" ")
        found[f"{place.partition(':')[0]} {kind}"] += count
    return {name: count for name, count in found.items() if name != OF_GLOO}
