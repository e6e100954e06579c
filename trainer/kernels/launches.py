"""Sizes of the head's programs, by architecture: what the compiled code's registers and shared
memory allow. `tests/kernels/compiled.py` reads them off; nothing here was timed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Sizes of a program."""

    queries: int = 128
    rows: int = 128
    dim: int = 64
    warps: int = 8
    stages: int = 3
    resident: bool = False
    """A tile of queries stays on the chip while all row tiles pass by; `dim` is then their whole
    width. Only rows are loaded again: 2 dim / queries halves a logit, whatever `rows` is."""


SUMMING = {
    "sm80": (Launch(), Launch(rows=64, warps=4)),
    "sm90": (Launch(), Launch(rows=256), Launch(warps=4)),
    "sm100": (Launch(), Launch(rows=64, warps=4)),
    "gfx942": (
        Launch(dim=32, stages=2),
        Launch(stages=2),
        Launch(rows=64, dim=32, warps=4, stages=2),
    ),
}
"""The first is the fixed one, the others are tried where sizes are timed."""
STORING = {
    "sm80": (Launch(dim=32), Launch(rows=64, warps=4)),
    "sm90": (Launch(stages=2), Launch(rows=256), Launch(warps=4)),
    "sm100": (Launch(stages=2), Launch(rows=64, warps=4)),
    "gfx942": SUMMING["gfx942"],
}
"""As `SUMMING`; the tile on its way out takes a stage's shared memory."""
KEEPING = {
    "sm80": (Launch(rows=64),),
    "sm90": (Launch(stages=2), Launch(warps=4)),
    "sm100": (Launch(stages=2),),
    "gfx942": (Launch(dim=32, stages=2),),
}
"""As `SUMMING`, of a forward pass that writes its exponentials too."""
RESIDENT = {
    ("sm90", 512): Launch(rows=32, dim=512, stages=2, resident=True),
    ("sm90", 256): Launch(rows=64, dim=256, stages=2, resident=True),
}
"""By architecture and width: the fixed ones of the forward pass where there is one. A width of 768
has no room beside a row tile; with fewer than 256 the exponentials decide."""


def forward_launches(architecture: str, dim: int, *, keeping: bool) -> tuple[Launch, ...]:
    """The fixed one first."""
    resident = RESIDENT.get((architecture, dim))
    others = (KEEPING if keeping else SUMMING)[architecture]
    return (*((resident,) if resident else ()), *others)


def architecture_of(device: torch.device) -> str:
    """The nearest architecture there is a launch for; a CPU's interpreter runs any."""
    if device.type == "cpu":
        return "sm90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm90", 10: "sm100"}.get(major, "sm80")
