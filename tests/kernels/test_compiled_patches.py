"""The machine code of the loudest patches' kernels: no time, but what makes one slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.test_compiled import (
    AMD_LOCAL_BYTES,
    ROOT,
    SHARED_PER_PROCESSOR,
    programs_at_once,
)


def built(which: str, folder: Path) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
    }
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_patches", which],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = finished.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.heavy
def test_products_stay_in_registers_on_every_generation(tmp_path: Path) -> None:
    rows = built("halves", tmp_path)
    assert len(rows) == 9
    for row in rows:
        fits(row)
        assert row["spills"] == 0, row
        assert row["matrix_instructions"] > 0, row
        assert row["async_copies"] > 0, row


@pytest.mark.slow
def test_other_precisions_and_makers_compile_to_products_of_matrices(tmp_path: Path) -> None:
    rows = built("others", tmp_path)
    assert len(rows) == 27
    for row in rows:
        fits(row)
        assert row["matrix_instructions"] > 0, row


def fits(row: dict[str, Any]) -> None:
    assert "failed" not in row, row
    if row["architecture"] == "gfx942":
        assert row["shared"] <= AMD_LOCAL_BYTES, row
        return
    assert row["shared"] <= (SHARED_PER_PROCESSOR[row["architecture"]] - 1) * 1024, row
    assert programs_at_once(row) >= 1, row
