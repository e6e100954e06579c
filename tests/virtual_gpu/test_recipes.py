"""Recipes on a pretended GPU, over two ranks: no mix of devices, and few waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port

pytest.importorskip("triton", reason="Triton's wheel is for Linux")
ROOT = Path(__file__).parents[2]

FINITE = {"trainer/engine/zero.py _local_scalar_dense": 1}
"""Stage 0 looks whether the gradient is finite. ZeRO's other stages wait as often of themselves."""
HEAD = {
    "trainer/parts/sampling.py nonzero": 2,  # how many rows are drawn, and how many are positives
    "trainer/parts/prototype_head.py tolist": 1,  # whether its gradient is finite
}
OF_GLOO = "trainer/comm.py copy to the device"
"""Gloo's sum that is dealt out copies in C++, from where no tag is seen; NCCL's does not."""
BUDGET = {"mlcd/2": HEAD | FINITE, "protoclip/2": FINITE, "clip": FINITE, "siglip": FINITE}
"""Waits of a whole step by file, whatever its number of micro-batches (`/2`: two)."""


def rows_of(folder: Path, cases: list[str], world_size: int) -> list[list[dict[str, Any]]]:
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
        said = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    return [
        [json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in said
    ]


@pytest.mark.heavy
def test_steps_mix_no_devices_and_wait_no_more_than_their_budget(tmp_path: Path) -> None:
    """Training, episodes and the run's own collectives; nothing waits before the first forward
    pass, so that the device is never without work while a batch is made ready."""
    for rank in rows_of(tmp_path, list(BUDGET), 2):
        assert [row["case"] for row in rank] == list(BUDGET)
        for row in rank:
            assert row["finished"], row
            assert row["before"] == {}, row
            assert by_file(row["all"]) == BUDGET[row["case"]], row


def by_file(waits: dict[str, int]) -> dict[str, int]:
    """Without line numbers, which every edit moves."""
    found: dict[str, int] = {}
    for wait, count in waits.items():
        place, _, kind = wait.partition(" ")
        name = f"{place.partition(':')[0]} {kind}"
        found[name] = found.get(name, 0) + count
    found.pop(OF_GLOO, None)
    return found
