"""Benchmarks in processes of their own: one or several ranks, results through a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(module: str, case: str, *, ranks: int, threads: int) -> list[dict[str, Any]]:
    """What `python -m <module> <case> <file>` writes into the file, run on `ranks` ranks.

    torch's own launcher starts several ranks, picks a free port, and ends all if one fails.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    launcher = [
        *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        f"--nproc-per-node={ranks}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "rows.json"
        finished = subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), "-m", module, case, str(results)],
            env={**os.environ, **dict.fromkeys(names, str(threads))},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise RuntimeError(f"{module} on {ranks} ranks failed:\n{finished.stderr}")
        rows: list[dict[str, Any]] = json.loads(results.read_text())
        return rows
