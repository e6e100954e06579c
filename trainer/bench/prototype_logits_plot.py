"""The sweep of `prototype-logits` as a picture: time and memory over the number of prototypes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "tab:blue", "marker": "o", "linewidth": 2.5, "zorder": 3},
    "naive": {"color": "tab:red", "marker": "s"},
    "compile": {"color": "tab:orange", "marker": "^", "linestyle": "--"},
    "cce": {"color": "tab:green", "marker": "x", "linestyle": ":"},
}
LEAST_MIB = 1.0


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each batch and dim, a line for each side; forward and backward together, with
    the fewest threads of the rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = min(row["threads"] for row in rows)
    kept = [
        row
        for row in rows
        if row["seconds"] is not None
        and row["pass"] == "forward+backward"
        and row["threads"] == threads
    ]
    shapes = sorted({(row["batch"], row["dim"]) for row in kept})
    figure, axes = pyplot.subplots(
        *(2, len(shapes)),
        figsize=(3.2 * len(shapes) + 1.5, 6.5),
        layout="constrained",
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for column, (batch, dim) in enumerate(shapes):
        some = [row for row in kept if (row["batch"], row["dim"]) == (batch, dim)]
        _draw(axes[0, column], axes[1, column], some)
        axes[0, column].set_title(f"batch {batch}, dim {dim}")
        axes[1, column].set_xlabel("prototypes")
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel(f"extra MiB, at least {LEAST_MIB:g}")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    figure.suptitle(f"Cross-entropy, forward and backward, {threads} thread(s)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(time: Any, memory: Any, rows: Rows) -> None:
    for name in dict.fromkeys(row["name"] for row in rows):
        line = sorted((r for r in rows if r["name"] == name), key=lambda r: r["prototypes"])
        counts = [row["prototypes"] for row in line]
        style = {"markersize": 5, "label": name, **STYLES[name]}
        time.loglog(counts, [row["cpu_seconds"] for row in line], **style)
        extra = [max(row["extra_bytes"] / 2**20, LEAST_MIB) for row in line]
        memory.loglog(counts, extra, **style)
    bounds = sorted({(row["prototypes"], row["bound_seconds"]) for row in rows})
    style = {"color": "black", "marker": "_", "linestyle": "-.", "label": "products alone"}
    time.loglog(*zip(*bounds, strict=True), **style)
    for axis in (time, memory):
        axis.grid(alpha=0.3, which="both")
