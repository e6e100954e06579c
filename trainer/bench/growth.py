"""How figures grow with a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def exponents(
    rows: Sequence[Mapping[str, Any]], size: str, figures: Sequence[str]
) -> dict[str, float]:
    """p of `figure = c * size^p`, fitted to all rows: 1 is proportional, 0 is constant."""
    sizes = np.log([row[size] for row in rows])
    return {
        name: float(np.polyfit(sizes, np.log([max(row[name], 1e-6) for row in rows]), 1)[0])
        for name in figures
    }
