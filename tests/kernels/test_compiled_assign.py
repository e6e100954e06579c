"""The machine code of the nearest centroids' kernels: no time, but what makes one slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.kernels.test_compiled import (
    AMD_LOCAL_BYTES,
    ARCHITECTURES,
    ROOT,
    SHARED_PER_PROCESSOR,
    programs_at_once,
)

PROGRAMS = {"sm80": 1, "sm90": 2, "sm100": 1}
"""At once on a processor, where points are read again for every tile."""
AMD_WAVES = 4


@cache
def builds(folder: str) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": folder,
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_assign"],
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
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return builds(str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_maxima_are_matrix_products_that_stay_in_registers(
    rows: list[dict[str, Any]], architecture: str
) -> None:
    mine = [r for r in rows if (r["architecture"], r["kernel"]) == (architecture, "maxima")]
    assert [(row["kind"], row["width"]) for row in mine] == [
        *(("fp16", width) for width in (64, 256, 768)),
        *(("fp32", 128), ("fp32", 768), ("bf16", 768)),
    ]
    for row in mine:
        fits(row)
        assert row["matrix_instructions"] > 0, row
        assert row["async_copies"] > 0, row
        assert row["tile_conversions"] == 0, row
        if row["width"] < 768:
            continue
        if architecture == "gfx942":
            assert row["waves"] >= AMD_WAVES, row
        else:
            assert programs_at_once(row) >= PROGRAMS[architecture], row


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_groups_leave_room_for_many_programs(
    rows: list[dict[str, Any]], architecture: str
) -> None:
    (row,) = [r for r in rows if (r["architecture"], r["kernel"]) == (architecture, "scores")]
    fits(row)
    if architecture == "gfx942":
        assert row["waves"] >= AMD_WAVES, row
    else:
        assert programs_at_once(row) >= 8, row


def fits(row: dict[str, Any]) -> None:
    assert "failed" not in row, row
    assert row["spills"] == 0, row
    limit = SHARED_PER_PROCESSOR.get(row["architecture"])
    assert row["shared"] <= (AMD_LOCAL_BYTES if limit is None else (limit - 1) * 1024), row
