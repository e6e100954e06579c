"""Starts a program of this folder under Triton's interpreter.

A process of its own, because the interpreter has to be chosen before Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def rows_of(program: str) -> list[dict[str, Any]]:
    """The JSON rows that `TRITON_INTERPRET=1 python -m PROGRAM` prints."""
    finished = subprocess.run(
        [sys.executable, "-m", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]
