"""A table's picture: concepts, their bin means and the published line, on one axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.concepts.binned import binned
from trainer.concepts.trend import Table


def plot_trend(table: Table, figures: dict[str, Any], path: Path, *, source: str) -> None:
    """Two panels: every concept with the spread that means hide, and means with their counts."""
    from matplotlib.figure import Figure  # takes a second to import

    found = binned(table.frequency, table.accuracy)
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    single, means = figure.subplots(1, 2)
    shake = np.random.default_rng(0).normal(0, 1, (2, len(table.frequency)))
    single.plot(
        np.maximum(table.frequency, 0.5) * np.exp(0.05 * shake[0]),
        table.accuracy + shake[1],
        ".",
        markersize=3,
        alpha=0.35,
    )
    raw, within = figures["per_concept"], figures["within_datasets"]
    single.set_title(
        f"{raw['rows']} concepts: r = {raw['pearson']:.2f}, Spearman {raw['spearman']:.2f}",
        fontsize=10,
    )
    single.set_ylabel("accuracy of a concept, percent")
    for level in figures["by_frequency"]:
        label = f"{level['frequency']}: {level['mean_of_concepts']:.1f} % of {level['rows']}"
        means.plot([], [], " ", label=label)
    rows = found.rows > 0
    edges = np.exp(found.log_edges)
    error = found.deviation[rows] / np.sqrt(found.rows[rows])
    means.errorbar(
        edges[rows], found.mean[rows], yerr=error, fmt="o-", color="tab:blue", markersize=4
    )
    for x, y, count in zip(edges[rows], found.mean[rows], found.rows[rows], strict=True):
        means.annotate(str(count), (x, y), (0, 6), textcoords="offset points", fontsize=8)
    means.set_title(
        f"bin means: rho = {found.rho:.2f}; within sets {within['slope']:.1f} points a decade",
        fontsize=10,
    )
    # Beside the points: inside it would hide the longest bars.
    means.legend(
        fontsize=8,
        title="frequency: mean of concepts",
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )
    for panel in (single, means):
        panel.set_xscale("log")
        panel.set_xlabel(f"samples with the concept ({source}); 0 is drawn at 0.5", fontsize=9)
        panel.tick_params(labelsize=9)
    figure.savefig(path, dpi=120)
