"""Pictures of the k-means benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.bench.kmeans_worker import Size

Row = dict[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """What the rows differ in against CPU time: K, N, or the inertia."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    smallest = Size(*(min(row[name] for row in rows) for name in Size._fields))
    growing = [name for name in ("clusters", "points") if len({row[name] for row in rows}) > 1]
    width = 5.5 * (len(growing) or 1)
    figure, axes = pyplot.subplots(
        1, len(growing) or 1, figsize=(width, 4.5), layout="constrained", squeeze=False
    )
    if not growing:
        _curve(axes[0, 0], rows)
    for axis, name in zip(axes[0], growing, strict=False):
        others = [other for other in Size._fields if other != name]
        line = [r for r in rows if all(r[other] == getattr(smallest, other) for other in others)]
        _growth(axis, line, name)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _growth(axis: Any, rows: Sequence[Row], name: str) -> None:
    """CPU time over one of the sizes, a line for each side; the dots grow in proportion."""
    from matplotlib.ticker import LogLocator

    for side in dict.fromkeys(row["name"] for row in rows):
        line = _sorted(rows, side, lambda row: row[name])
        sizes, seconds = [r[name] for r in line], [r["cpu_seconds"] for r in line]
        (drawn,) = axis.loglog(sizes, seconds, marker="o", label=side)
        ideal = [seconds[0] * size / sizes[0] for size in sizes]
        axis.loglog(sizes, ideal, linestyle=":", linewidth=1, color=drawn.get_color())
    axis.set(xlabel=name, ylabel="CPU seconds")
    axis.set_xticks(sorted({row[name] for row in rows}), labels=None)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _curve(axis: Any, rows: Sequence[Row]) -> None:
    """Inertia above the least, over CPU time; points of two-level rows carry their probes."""
    least = min(row["inertia"] for row in rows)
    for side in dict.fromkeys(row["name"] for row in rows):
        line = _sorted(rows, side, lambda row: row["cpu_seconds"])
        seconds = [row["cpu_seconds"] for row in line]
        above = [100 * (row["inertia"] / least - 1) for row in line]
        axis.plot(seconds, above, marker="o", label=side)
        for row, x, y in zip(line, seconds, above, strict=True):
            if row["probes"] is not None:
                text = f"{row['probes']} probes"
                axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axis.set(xlabel="CPU seconds", ylabel="inertia above the least, %", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _sorted(rows: Sequence[Row], side: str, key: Callable[[Row], float]) -> list[Row]:
    return sorted((row for row in rows if row["name"] == side), key=key)
