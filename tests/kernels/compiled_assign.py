"""As `compiled`, the two kernels of the nearest centroids: one JSON row a build."""

from __future__ import annotations

import json
import re
import sys
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import ASTSource

from tests.kernels.compiled import (
    ASYNC_COPIES,
    MATRIX_INSTRUCTIONS,
    TARGETS,
    amd_code,
    nvidia_code,
)
from trainer.kernels.launches import Launch
from trainer.kernels.triton_assign import (
    GROUP,
    PAIR_DIM,
    launch_for,
    maxima_of_groups,
    scores_of_groups,
)

TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
MAXIMA = (
    *(("fp16", width) for width in (64, 256, 768)),
    *(("fp32", width) for width in (128, 768)),
    ("bf16", 768),
)


class Build(NamedTuple):
    """What is compiled: the maxima for points of some width, or the scores of groups."""

    architecture: str
    kernel: str
    kind: str
    """Of the operands."""
    width: int

    @property
    def launch(self) -> Launch:
        points = torch.empty(0, self.width, dtype=TYPES[self.kind])
        return launch_for(points, self.architecture)


BUILDS = [
    Build(architecture, "maxima", kind, width)
    for architecture, (kind, width) in product(TARGETS, MAXIMA)
] + [Build(architecture, "scores", "fp16", 768) for architecture in TARGETS]


def compiled(build: Build) -> Any:
    return _maxima(build) if build.kernel == "maxima" else _scores(build)


def _maxima(build: Build) -> Any:
    launch = build.launch
    constants = {
        "POINTS": launch.queries,
        "COLUMNS": launch.rows,
        "DIM": launch.dim,
        "GROUP": GROUP,
        "RESIDENT": build.width <= launch.dim,
    }
    pointers = {
        **dict.fromkeys(("points", "centroids"), f"*{build.kind}"),
        **dict.fromkeys(("offsets", "maxima"), "*fp32"),
    }
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return _built(build, maxima_of_groups, constants, pointers, options)


def _scores(build: Build) -> Any:
    pointers = {
        **dict.fromkeys(("points", "centroids"), f"*{build.kind}"),
        **dict.fromkeys(("rows", "groups"), "*i64"),
        **dict.fromkeys(("offsets", "scores"), "*fp32"),
    }
    constants = {"GROUP": GROUP, "DIM": PAIR_DIM}
    return _built(build, scores_of_groups, constants, pointers, {"num_warps": 4})


def _built(
    build: Build,
    kernel: Any,
    constants: dict[str, Any],
    pointers: dict[str, str],
    options: dict[str, int],
) -> Any:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    # The number of columns is a multiple of 32; that of points, and of groups, is any.
    aligned = [n for n in names if n in pointers or n in ("dim", "num_columns")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=TARGETS[build.architecture], options=options)


def report(build: Build) -> dict[str, Any]:
    binary = compiled(build)
    read = amd_code if build.architecture == "gfx942" else nvidia_code
    code, figures = read(binary)
    warps = build.launch.warps if build.kernel == "maxima" else 4
    return {
        **build._asdict(),
        **figures,
        "shared": binary.metadata.shared,
        "threads": TARGETS[build.architecture].warp_size * warps,
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[build.architecture], code)),
        "async_copies": len(re.findall(ASYNC_COPIES[build.architecture], code)),
        "tile_conversions": tile_conversions(binary.asm["ttgir"], build.launch),
    }


def tile_conversions(code: str, launch: Launch) -> int:
    """How often a whole tile of scores goes through shared memory to change its layout."""
    shapes = (f"{launch.queries}x{launch.rows}xf32", f"{launch.rows // GROUP}x{GROUP}xf32")
    lines = [line for line in code.splitlines() if "convert_layout" in line]
    return sum(any(shape in line for shape in shapes) for line in lines)


def main() -> None:
    for build in BUILDS:
        try:
            row = report(build)
        except Exception as problem:
            row = {**build._asdict(), "failed": f"{type(problem).__name__}: {problem}"[:300]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
