"""What other checkpoints do with the damage that this project's survives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trainer.log.environment import ROOT


@pytest.mark.slow
def test_only_own_checkpoints_come_back_whole_from_every_damage(tmp_path):
    command = [sys.executable, "-m", "tests.checkpoint.others", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(told, indent=1))
    for kind, found in told["own"].items():
        assert set(found) <= {"the newest", "the one before"}, (kind, found)
    assert any("OTHER NUMBERS" in found for found in told["deepspeed"].values())
