"""What devices can do, as their makers say, and what of it a plan assumes that a run gets."""

from __future__ import annotations

import os
from typing import NamedTuple

from trainer.errors import ConfigError

UTILISATION = 0.4
"""Share of the peak that a step's products are assumed to run at."""
WIRE_UTILISATION = 0.7
"""Share of a link's speed that collectives are assumed to reach."""


class Card(NamedTuple):
    """One device and its links."""

    name: str
    tflops: float
    """Dense products of a precision that a run uses, in 10^12 a second."""
    memory_gib: float
    link_gb_per_second: float
    """To the other devices of its host, one way."""
    wire_gb_per_second: float
    """To other hosts, for each device, one way."""
    per_host: int
    halves: bool
    """Whether `"bf16": {"enabled": "auto"}` means bfloat16 on it."""


CARDS = {
    card.name: card
    for card in (
        Card("a100", 312, 80, 300, 25, 8, halves=True),
        Card("a100-40gb", 312, 40, 300, 25, 8, halves=True),
        Card("h100", 989, 80, 450, 50, 8, halves=True),
        Card("h200", 989, 141, 450, 50, 8, halves=True),
        Card("b200", 2250, 180, 900, 50, 8, halves=True),
        Card("l40s", 362, 48, 32, 12.5, 8, halves=True),
    )
}
_CORE_TFLOPS = 0.1
"""One core with 512-bit vectors in float32."""


def card_of(name: str) -> Card:
    """ConfigError for a card that is not known. `cpu` is this machine, a process for each core."""
    if name == "cpu":
        return _this_machine()
    if name not in CARDS:
        known = ", ".join((*CARDS, "cpu"))
        raise ConfigError(f"no card {name!r} is known; say card= one of {known}")
    return CARDS[name]


def _this_machine() -> Card:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        memory = 8.0
    each = max(cores or 1, 1)
    return Card("cpu", _CORE_TFLOPS, memory / each, 5, 1, each, halves=False)


def wire_seconds(sent: float, card: Card, world_size: int) -> float:
    """Time to send so many bytes from each device, at the slowest link that they cross."""
    if world_size == 1:
        return 0.0
    link = card.link_gb_per_second if world_size <= card.per_host else card.wire_gb_per_second
    return sent / (link * 1e9 * WIRE_UTILISATION)
