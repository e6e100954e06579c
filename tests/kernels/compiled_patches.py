"""As `compiled`, the three kernels of the loudest patches: one JSON row a build.

`python -m tests.kernels.compiled_patches halves` builds for NVIDIA's, `... others` the rest.
"""

from __future__ import annotations

import json
import re
import sys
from itertools import product, starmap
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
from trainer.kernels import triton_patches

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = ("loudest_patches", "gradient_of_patches", "gradient_of_words")
POINTERS = {"values": "*fp32", "shares": "*fp32", "gradient": "*fp32", "winners": "*i16"}


class Build(NamedTuple):
    """A kernel for operands of a kind."""

    architecture: str
    kernel: str
    kind: str


def builds(which: str) -> list[Build]:
    halves = [
        Build(architecture, kernel, "fp16")
        for architecture, kernel in product(TARGETS, KERNELS)
        if architecture.startswith("sm")
    ]
    if which == "halves":
        return halves
    return [
        build for build in starmap(Build, product(TARGETS, KERNELS, TYPES)) if build not in halves
    ]


def compiled(build: Build) -> Any:
    kernel = getattr(triton_patches, build.kernel)
    tiles = triton_patches.tiles_for(TYPES[build.kind])
    constants = {"PATCHES": tiles.patches, "WORDS": tiles.words, "DIM": tiles.dim}
    if build.kernel == "loudest_patches":
        constants["ACTIVATED"] = True
    names = kernel.arg_names
    pointers = {"patches": f"*{build.kind}", "words": f"*{build.kind}", **POINTERS}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    # Rows are whole 16 bytes; those of winners and shares, one for each word, are any number.
    aligned = [n for n in names if n in pointers or n == "dim"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=TARGETS[build.architecture], options=options)


def report(build: Build) -> dict[str, Any]:
    binary = compiled(build)
    read = amd_code if build.architecture == "gfx942" else nvidia_code
    code, figures = read(binary)
    warps = triton_patches.tiles_for(TYPES[build.kind]).warps
    return {
        **build._asdict(),
        **figures,
        "shared": binary.metadata.shared,
        "threads": TARGETS[build.architecture].warp_size * warps,
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[build.architecture], code)),
        "async_copies": len(re.findall(ASYNC_COPIES[build.architecture], code)),
    }


def main(which: str) -> None:
    for build in builds(which):
        try:
            row = report(build)
        except Exception as problem:
            row = {**build._asdict(), "failed": f"{type(problem).__name__}: {problem}"[:300]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
