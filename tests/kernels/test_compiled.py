"""The machine code of the kernels for four architectures, none of which has to be here.

It shows no time. It does show what makes a kernel slow without failing: spilled registers, no
matrix instructions, exponentials taken twice, room for too few programs on a processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's wheel is for Linux")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
SHARED_PER_PROCESSOR = {"sm80": 164, "sm90": 228, "sm100": 228}
"""KiB, of which each program may have all but one, and pays one more than it asks for."""
PROGRAMS = {"sm80": 1, "sm90": 2, "sm100": 1}
"""Of the plain passes, at once on a processor: two hide each other's exponentials."""
AMD_WAVES = 3
AMD_LOCAL_BYTES = 65536


REGISTERS_WITH = {("bias",): 184, ("ceiling",): 128, ("bias", "online"): 184}
"""Of the summing pass on sm90. A bias takes it beyond the 128 of which two programs have room; the
storing pass has a shorter loop and keeps to them."""
ROW_PROGRAMS = {"float32": 8, "bfloat16": 8}
"""Of kernels that move rows, at once on a processor: they wait for memory, and hide it so."""


@cache
def builds(folder: str, which: str, program: str = "compiled") -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": folder,
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
    }
    finished = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{program}", which],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = finished.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("triton"))


def programs_at_once(row: dict[str, Any]) -> int:
    by_registers = 65536 // (-(-row["registers"] // 8) * 8 * row["threads"])
    by_shared = SHARED_PER_PROCESSOR[row["architecture"]] * 1024 // (row["shared"] + 1024)
    return min(by_registers, by_shared, 2048 // row["threads"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("which", ["fixed", pytest.param("timed", marks=pytest.mark.slow)])
def test_machine_code(folder: str, which: str, architecture: str) -> None:
    mine = [row for row in builds(folder, which) if row["architecture"] == architecture]
    assert len(mine) >= 4
    for row in mine:
        assert "failed" not in row, row
        assert row["spills"] == 0, row
        assert row["matrix_instructions"] > 0, row
        assert row["async_copies"] > 0, row
        # The running maximum rescales its sum: one more per query and tile, not per logit.
        running_maximum = row["everything"] and not row["storing"]
        assert 0.9 < row["exponentials_per_logit"] <= (1.15 if running_maximum else 1.1), row
        fixed = which == "fixed" and not row["everything"]
        if architecture == "gfx942":
            assert row["shared"] <= AMD_LOCAL_BYTES, row
            assert row["waves"] >= (AMD_WAVES if fixed else 2), row
        else:
            assert row["shared"] <= (SHARED_PER_PROCESSOR[architecture] - 1) * 1024, row
            assert programs_at_once(row) >= (PROGRAMS[architecture] if fixed else 1), row


@pytest.mark.heavy
def test_machine_code_with_what_runs_switch_on(folder: str) -> None:
    """Neither spills nor repeated exponentials; how many programs a processor holds."""
    found = builds(folder, "flags")
    assert len(found) == 5
    for row in found:
        assert "failed" not in row, row
        assert row["spills"] == 0, row
        assert 0.9 < row["exponentials_per_logit"] <= 1.15, row
        most = 128 if row["storing"] else REGISTERS_WITH[tuple(row["flags"])]
        assert row["registers"] <= most, row
        assert programs_at_once(row) >= (2 if most == 128 else 1), row


RESIDENT_REGISTERS = 96
"""At most, in every form of a forward pass whose queries stay on the chip: shared memory lets one
program of 256 threads run at a time, and its next row tile is under way while it computes."""


@pytest.mark.heavy
def test_machine_code_of_forward_passes_that_keep_their_exponentials(folder: str) -> None:
    """Nor of those whose queries stay: no spills, no exponential twice, room on a processor."""
    found = builds(folder, "kept")
    assert len(found) == 2 * 5 + 4 * 3
    for row in found:
        assert "failed" not in row, row
        # A tile's mask is wider than the scalar registers; they spill into vector registers' lanes.
        masked = row["architecture"] == "gfx942" and "ceiling" in row["flags"]
        assert row["into_memory" if masked else "spills"] == 0, row
        assert 0.9 < row["exponentials_per_logit"] <= 1.15, row
        assert row["async_copies"] > 0, row
        if row["architecture"] == "gfx942":
            assert row["waves"] >= 2, row
            continue
        assert row["shared"] <= (SHARED_PER_PROCESSOR[row["architecture"]] - 1) * 1024, row
        assert programs_at_once(row) >= 1, row
        width, resident = row["launch"][2], row["launch"][5]
        if resident:
            assert row["registers"] <= RESIDENT_REGISTERS, row
            queries, tile, stages = row["launch"][0], row["launch"][1], row["launch"][4]
            assert row["shared"] >= 2 * width * (queries + stages * tile), "rows come ahead"


@pytest.mark.heavy
def test_machine_code_of_kernels_that_move_rows(folder: str) -> None:
    """Wide loads, no spills, and enough programs at once to hide how long memory takes."""
    found = builds(folder, "all", "compiled_rows")
    assert len(found) == 4 * 2 * 2 * 2
    for row in found:
        assert "failed" not in row, row
        assert row["spills"] == 0, row
        assert row["shared"] == 0, row
        if row["architecture"] == "gfx942":
            assert row["waves"] == 8, row
        else:
            assert row["widest"] >= 64, row
            assert programs_at_once(row) >= ROW_PROGRAMS[row["rows"]], row
