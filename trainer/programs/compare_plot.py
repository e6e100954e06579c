"""A comparison as a picture: a panel for each figure, a bar for each variant, a dot a seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS_A_ROW = 4
FLOOR_LINES = ("--", ":", "-.")

Runs = Mapping[str, Sequence[Mapping[str, float]]]
"""The figures of every run, by variant."""


def plot_comparison(found: Runs, path: Path, floors: Mapping[str, Mapping[str, float]]) -> None:
    """Write a PNG: means as bars, sample standard deviations as whiskers, single seeds as dots.

    A line across a panel is what costs no training, by the names in `floors`.
    """
    from matplotlib.figure import Figure  # takes a second to import

    columns = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
    if not columns:
        return
    across = min(PANELS_A_ROW, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, column in zip(panels, columns, strict=False):
        panel.set_title(column.replace("_", " ").replace(" r1", " R@1"), fontsize=10)
        panel.set_ylabel("percent", fontsize=9)
        panel.tick_params(labelsize=9)
        _bars(panel, found, column)
        for line, (name, values) in zip(FLOOR_LINES, floors.items(), strict=False):
            if column in values:
                panel.axhline(
                    values[column], color="black", linewidth=1, linestyle=line, label=name
                )
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    lines = {name: line for panel in panels for line, name in zip(*_legend(panel), strict=True)}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower right", ncols=3, fontsize=9)
    figure.savefig(path, dpi=120)


def _bars(panel: Any, found: Runs, column: str) -> None:
    present = {
        name.replace("_", "\n"): values
        for name, runs in found.items()
        if (values := [run[column] for run in runs if column in run])
    }
    for place, values in enumerate(present.values()):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        panel.bar(place, statistics.mean(values), yerr=spread, alpha=0.5, color="tab:blue")
        panel.plot([place] * len(values), values, ".k", markersize=4)
    longest = max((len(line) for name in present for line in name.split("\n")), default=0)
    crowded = longest * len(present) > 32  # letters that fit below a panel
    panel.set_xticks(
        range(len(present)),
        present,
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
    )


def _legend(panel: Any) -> tuple[list[Any], list[str]]:
    lines, names = panel.get_legend_handles_labels()
    return list(lines), list(names)
