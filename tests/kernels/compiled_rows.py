"""Compiles the kernels that move rows for GPUs that need not be there, and reads the machine code.

`python -m tests.kernels.compiled_rows` prints one JSON row a build: every architecture, with and
without places, of widths that one program holds at once or in several parts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource

from tests.kernels.compiled import TARGETS, amd_code, nvidia_code
from trainer.kernels.triton_half_rows import SQUARE_LOWEST, SQUARE_SHIFT, adamw_of_half_rows
from trainer.kernels.triton_rows import adamw_of_rows

WARPS = 4
KERNELS: dict[str, tuple[Any, dict[str, str]]] = {
    "float32": (
        adamw_of_rows,
        {
            **dict.fromkeys(
                ("rows", "means", "squares", "gradient", "sizes", "corrections"), "*fp32"
            ),
            **dict.fromkeys(("kept", "share", "beta_square", "square_share", "epsilon"), "fp32"),
            "places": "*i64",
        },
    ),
    "bfloat16": (
        adamw_of_half_rows,
        {
            **dict.fromkeys(("rows", "means"), "*bf16"),
            **dict.fromkeys(("gradient", "kepts", "sizes", "corrections"), "*fp32"),
            **dict.fromkeys(("places", "noises"), "*i64"),
            **dict.fromkeys(("share", "beta_square", "square_share", "epsilon"), "fp32"),
            "squares": "*u8",
        },
    ),
}
"""A kernel and the types of its arguments; any other is a number."""


class Build(NamedTuple):
    architecture: str
    rows: str
    has_places: bool
    numbers: int


def builds() -> Iterator[Build]:
    for architecture, rows, has_places in product(TARGETS, KERNELS, (False, True)):
        for numbers in (256, 512) if rows == "bfloat16" else (512, 1024):
            yield Build(architecture, rows, has_places, numbers)


def report(build: Build) -> dict[str, Any]:
    kernel, types = KERNELS[build.rows]
    names = kernel.arg_names
    constants = {"HAS_PLACES": build.has_places, "NUMBERS": build.numbers}
    if build.rows == "bfloat16":
        constants |= {"SHIFT": SQUARE_SHIFT, "LOWEST": SQUARE_LOWEST}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n == "dim"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    target = TARGETS[build.architecture]
    binary = triton.compile(source, target=target, options={"num_warps": WARPS})
    read = amd_code if build.architecture == "gfx942" else nvidia_code
    code, figures = read(binary)
    return {
        **build._asdict(),
        **figures,
        "shared": binary.metadata.shared,
        "threads": target.warp_size * WARPS,
        "widest": max(
            map(int, re.findall(r"(?:LDG|STG)\.E\.(?:\w+\.)*?(64|128)\b", code)), default=0
        ),
    }


def main(which: str = "all") -> None:
    assert which == "all"
    for build in builds():
        try:
            row = report(build)
        except Exception as problem:
            row = {**build._asdict(), "failed": f"{type(problem).__name__}: {problem}"[:300]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
