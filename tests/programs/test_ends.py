"""Pairs of ranks that end are counted by how they end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.log.environment import ROOT


@pytest.mark.heavy
def test_pairs_of_ranks_end_well() -> None:
    command = [sys.executable, "tools/soak.py", "--ends", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 pairs of ranks ended by {'0': 6}" in done.stdout
    assert "terminate called" not in done.stderr
