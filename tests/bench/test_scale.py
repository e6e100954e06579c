"""The bench of long lists opens real catalogues, and its figures are of the process that opens."""

from __future__ import annotations

import json
import subprocess
import sys


def test_each_length_is_a_row_and_the_last_says_how_figures_grow(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "tools/bench.py", "scale", "--json", str(out), "--folder", tmp_path]
    lengths = ["--shards", "50", "100", "200", "--samples", "70"]
    done = subprocess.run([*command, *lengths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["samples"] for row in rows[:-1]] == [3500, 7000, 14000]
    assert all(row["descriptors"] < 20 for row in rows[:-1])
    assert rows[-1]["shards"] == "growth"
    assert 0.8 < rows[-1]["worker_mib"] < 1.2  # bytes of the table: proportional
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
