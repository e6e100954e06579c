"""Compiles the Triton kernels for GPUs that need not be there, and reads the machine code.

A program of its own, because the interpreter, where a test has chosen it, compiles nothing:
`python -m tests.kernels.compiled fixed` prints one JSON row a build, `... timed` of the other sizes
that are tried where sizes are timed, `... flags` of what runs switch on, `... kept` of forward
passes that keep their exponentials.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.kernels.launches import KEEPING, RESIDENT, STORING, SUMMING, Launch
from trainer.kernels.triton_logits import exponential_product

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": r"UTC\w*MMA", "gfx942": "v_mfma"}
ASYNC_COPIES = {"sm80": "LDGSTS", "sm90": "UTMALDG", "sm100": "UTMALDG", "gfx942": "_load_dwordx4"}
POINTERS = {
    **dict.fromkeys(("queries", "rows", "stored"), "*fp16"),
    **dict.fromkeys(("offsets", "pair_queries", "pair_rows"), "*i32"),
    **dict.fromkeys(("bias", "shift", "weight", "sums", "peaks"), "*fp32"),
    **dict.fromkeys(("scale", "ceiling", "reference"), "fp32"),
}


class Build(NamedTuple):
    """What is compiled: a pass, plain or with everything switched on that can be."""

    architecture: str
    storing: bool
    everything: bool
    launch: Launch
    flags: tuple[str, ...] = ()
    """Instead of everything, some of `bias`, `ceiling`, `online` and `kept`."""

    def has(self, flag: str) -> bool:
        return flag in self.flags or (self.everything and flag != "kept")


def builds(architectures: Iterable[str], candidates: slice) -> Iterator[Build]:
    """Of each candidate of some; the first is the fixed one."""
    for architecture, storing in product(architectures, (False, True)):
        for launch in (STORING if storing else SUMMING)[architecture][candidates]:
            yield from (Build(architecture, storing, all_on, launch) for all_on in (False, True))


USED = (("bias",), ("ceiling",), ("bias", "online"))
"""What runs switch on: logq, the inter-class filter, and prototypes of episodes, whose products
have no bound."""


def flagged(architectures: Iterable[str]) -> Iterator[Build]:
    """The fixed launches with each set of flags that runs use."""
    for architecture, storing, flags in product(architectures, (False, True), USED):
        launch = (STORING if storing else SUMMING)[architecture][0]
        if not (storing and "online" in flags):
            yield Build(architecture, storing, False, launch, flags)


KEPT = (("kept",), ("bias", "kept"), ("ceiling", "kept"))
ONLINE = ("bias", "online")


def kept(architectures: Iterable[str]) -> Iterator[Build]:
    """Forward passes that keep, and those whose queries stay: all sizes that are fixed."""
    for architecture in architectures:
        mine = [launch for (name, _), launch in RESIDENT.items() if name == architecture]
        for launch in (*mine, KEEPING[architecture][0]):
            more = ((), ONLINE) if launch.resident else ()
            for flags in (*KEPT, *more):
                yield Build(architecture, False, False, launch, flags)


def compiled(build: Build) -> Any:
    launch, names = build.launch, exponential_product.arg_names
    constants = {
        "QUERIES": launch.queries,
        "ROWS": launch.rows,
        "DIM": launch.dim,
        "HAS_BIAS": build.has("bias"),
        "HAS_CEILING": build.has("ceiling"),
        "ONLINE": build.has("online") and not build.storing,
        "STORE": build.storing,
        "KEEP": build.has("kept"),
        "RESIDENT": launch.resident,
        "PRECISION": "ieee",
        # A one is a constant to the runtime's compiler too.
        **({"tiles_per_split": 1} if build.storing else {}),
    }
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    if build.has("kept"):
        signature["stored"] = "*bf16"
    aligned = [n for n in names if signature[n].startswith("*") or n in ("dim", "stored_stride")]
    source = ASTSource(
        fn=exponential_product,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=TARGETS[build.architecture], options=options)


def report(build: Build) -> dict[str, Any]:
    binary, launch = compiled(build), build.launch
    read = amd_code if build.architecture == "gfx942" else nvidia_code
    code, figures = read(binary)
    lanes = TARGETS[build.architecture].warp_size * launch.warps
    exponentials = len(re.findall(r"MUFU\.EX2|v_exp_f32", code))
    return {
        **build._asdict(),
        **figures,
        "shared": binary.metadata.shared,
        "threads": lanes,
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[build.architecture], code)),
        "async_copies": len(re.findall(ASYNC_COPIES[build.architecture], code)),
        "exponentials_per_logit": exponentials * lanes / (launch.queries * launch.rows),
    }


def nvidia_code(binary: Any) -> tuple[str, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = said(TOOLS / "cuobjdump", "-res-usage", path)
        code = said(TOOLS / "nvdisasm", "-c", path)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return code, {"registers": registers, "spills": len(re.findall(r"\b(?:LDL|STL)\b", code))}


def amd_code(binary: Any) -> tuple[str, dict[str, int]]:
    code = binary.asm["amdgcn"]
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
    spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    waves = int(re.findall(r"; Occupancy: (\d+)", code)[0])
    into_memory = numbers["vgpr_spill_count"]
    found = {"registers": numbers["vgpr_count"], "spills": spills, "into_memory": into_memory}
    return code, {**found, "waves": waves}


def said(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def main(which: str) -> None:
    candidates = slice(0, 1) if which == "fixed" else slice(1, None)
    wanted = flagged(("sm90",)) if which == "flags" else builds(TARGETS, candidates)
    wanted = kept(TARGETS) if which == "kept" else wanted
    for build in wanted:
        try:
            row = report(build)
        except Exception as problem:
            # The compiler may print a whole program; its first line says what is wrong.
            row = {**build._asdict(), "failed": f"{type(problem).__name__}: {problem}"[:300]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
