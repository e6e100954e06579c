"""The bench of tools that look at data runs the tools, and its figures are of their processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs.test_killed import written
from trainer.bench.curation import TOOLS

BENCH = [sys.executable, "tools/bench.py", "curation"]


@pytest.mark.slow
def test_each_number_of_shards_is_a_row_and_the_last_says_how_memory_grows(tmp_path: Path) -> None:
    spec, model, _ = written(tmp_path)
    out = tmp_path / "rows.json"
    command = [*BENCH, "--json", str(out), "--data", spec, "--model", str(model)]
    command += ["--target", "kind", "--classes", "kind", "--shards", "2", "5", "11"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *rows, growth = json.loads(out.read_text())
    assert [row["samples"] for row in rows] == [48, 120, 264]
    assert all(0 < row[f"{tool}_mib"] < 500 for tool in TOOLS for row in rows)
    assert growth["shards"] == "growth"
    assert all(growth[f"{tool}_mib"] < 0.5 for tool in TOOLS)
    done = subprocess.run([*command, "12"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the last of which is the test" in done.stderr
