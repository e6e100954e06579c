"""Memory of the tools that look at data, over more and more shards.

Each tool runs as its users run it, in a process of its own: bank and scan of the first shards, then
counts, a reduction and a linear probe of what the scan has written, tested on the last shard.
Figures are the most that a process held, above what its `--help` takes.
"""

from __future__ import annotations

import argparse
import atexit
import json
import re
import runpy
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from trainer.bench.growth import exponents
from trainer.bench.launch import ROOT, launch
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError

TOOLS = ("scan", "count", "reduce", "tune")


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, metavar="SHARDS")
    command.add_argument("--model", required=True, help="as tools/scan.py takes it")
    command.add_argument("--target", default="concept", help="json key of names, for the bank")
    command.add_argument("--classes", default="vendor", help="json key that is probed")
    command.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])


def measure_options(options: argparse.Namespace) -> list[dict[str, Any]]:
    shards = ShardSet.open(options.data)
    if max(options.shards) >= len(shards.shards):
        raise ConfigError(
            f"{options.data} has {len(shards.shards)} shards, the last of which is the test; ask "
            "for fewer"
        )
    rows = []
    for count in options.shards:
        spec = "::".join(shards.shards[:count])
        samples = sum(shards.sizes[:count])
        with tempfile.TemporaryDirectory() as folder:
            peaks = measure(spec, shards.shards[-1], Path(folder), options)
        rows.append({"shards": count, "samples": samples, **peaks})
    growth = exponents(rows, "samples", list(peaks)) if len(rows) > 2 else None
    return [*rows, {"shards": "growth", **growth}] if growth else rows


def measure(spec: str, test: str, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """`TOOL_mib` of each of TOOLS over these shards, above what its help takes."""
    bank, scan, features = out / "bank.jsonl", out / "scan", out / "features"
    looked = ("--model", options.model, "--bank", bank)
    commands = {
        "bank": ("concepts", "bank", "--data", spec, "--target", options.target, "--out", bank),
        "test": ("scan", "--data", test, *looked, "--out", out / "test"),
        "scan": ("scan", "--data", spec, *looked, "--out", scan),
        "count": ("concepts", "count", "--data", spec, "--bank", bank, "--out", out / "counts"),
        "reduce": ("reduce", scan, "--data", spec, "--out", out / "r", "share=0.5", "clusters=16"),
        "tune": (
            *("tune", "--features", features, "--target", options.classes, "--train", spec),
            *("--test", f"test={test}", "--methods", "linear", "--seeds", "1"),
            *("--out", out / "tuned"),
        ),
    }
    peaks = {}
    for name, (tool, *arguments) in commands.items():
        if name == "tune":
            features.mkdir()
            (scan / "images").rename(features / "train")
            (out / "test" / "images").rename(features / "test")
        peaks[name] = _peak(str(tool), *map(str, arguments)) - _idle(str(tool))
    return {f"{name}_mib": peaks[name] for name in TOOLS}


@cache
def _idle(tool: str) -> float:
    return _peak(tool, "--help")


def _peak(tool: str, *arguments: str) -> float:
    case = json.dumps([f"tools/{tool}.py", *arguments])
    (row,) = launch("trainer.bench.curation", case, ranks=1, threads=1)
    return float(row["peak_mib"])


def _write_peak(results: Path) -> None:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found
    results.write_text(json.dumps([{"peak_mib": int(found[1]) / 2**10}]))


if __name__ == "__main__":
    atexit.register(_write_peak, Path(sys.argv[2]))  # tools end the process themselves
    sys.argv = json.loads(sys.argv[1])
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
