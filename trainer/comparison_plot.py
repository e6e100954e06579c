"""A comparison as a picture: a panel for each figure, a bar for each variant, a dot a seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

PANELS_A_ROW = 4


def plot_comparison(found: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Write a PNG: means as bars, sample standard deviations as whiskers, single seeds as dots."""
    columns = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
    if not columns:
        return
    across = min(PANELS_A_ROW, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(3.2 * across, 3.0 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, column in zip(panels, columns, strict=False):
        panel.set_title(column, fontsize=8)
        panel.tick_params(axis="x", rotation=60, labelsize=7)
        for name, runs in found.items():
            values = [run[column] for run in runs if column in run]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                panel.bar(name, statistics.mean(values), yerr=spread, alpha=0.5, color="tab:blue")
                panel.plot([name] * len(values), values, ".k", markersize=3)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=120)
