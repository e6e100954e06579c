"""One HTML file that shows a study: points, laws, residuals, what a budget buys. Nothing else."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trainer.scaling.fit import HeldOut, Law
from trainer.scaling.forms import MEANING
from trainer.scaling.isoflop import Level, growth, levels
from trainer.scaling.points import Point, Points, columns

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.figure import Figure

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1080px;padding:24px;color:#202226}
h1{font-size:22px} h2{font-size:16px;margin:28px 0 6px} p{color:#50545c} img{max-width:100%}
table{border-collapse:collapse;margin:8px 0} td,th{padding:2px 12px 2px 0;text-align:left}
th{border-bottom:1px solid #c4c8d0;font-weight:600} td.n{text-align:right} a{color:#2457a8}
"""


class Curve(NamedTuple):
    """One recipe's points and what was fitted to them."""

    name: str
    points: Points
    laws: Sequence[Law]
    tests: Sequence[HeldOut]


def write_page(
    path: Path,
    curves: Sequence[Curve],
    *,
    title: str,
    sentences: Mapping[str, str],
    notes: Sequence[str] = (),
) -> Path:
    """Write the page; every name in it is escaped, and its policy allows nothing from outside."""
    heading = html.escape(title)
    said = "".join(
        f"<p><b>{html.escape(name)}</b>: {html.escape(text)}</p>"
        for name, text in sentences.items()
    )
    missing = "".join(f"<p>Not fitted: {html.escape(note)}</p>" for note in notes)
    body = "".join(
        f"<h2>{name}</h2>{_picture(figure, name)}"
        for name, figure in (
            ("Error against compute", _against_compute(curves)),
            ("Residuals: measured over fitted", _residuals(curves)),
            ("Each model at its budgets", _ladders(curves)),
            ("Equal compute: error over size", _equal_compute(curves)),
            ("Data against model", _data_against_model(curves)),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{heading}</title><style>{_STYLE}</style><h1>{heading}</h1>{said}{missing}{body}"
        f"{_laws(curves)}{_tests(curves)}{_runs(curves, path.parent)}</html>",
        encoding="utf-8",
    )
    return path


def _figure(width: float, height: float) -> Figure:
    """An empty one, so many inches across and down."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _against_compute(curves: Sequence[Curve]) -> Figure:
    figure = _figure(9, 5)
    panel: Any = figure.subplots()
    for number, curve in enumerate(curves):
        colour = f"C{number}"
        panel.plot(curve.points.compute, curve.points.error, ".", color=colour, label=_plain(curve))
        for law, line in zip(_in_compute(curve.laws), ("-", "--", ":"), strict=False):
            chosen = law.weight > 0
            x = curve.points.compute[chosen]
            panel.plot(x, curve.points.error[chosen], "o", color=colour, fillstyle="none")
            grid = np.geomspace(x.min(), 3 * curve.points.compute.max(), 60)
            at = columns([Point(run="", error=1.0, compute=float(c)) for c in grid])
            value, drawn = law.predicted(at)
            panel.plot(grid, value, line, color=colour, linewidth=1, label=law.form.name)
            if len(drawn):
                low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
                panel.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
    panel.set(xscale="log", yscale="log", xlabel="compute", ylabel=_metric(curves))
    panel.legend(fontsize=8)
    return figure


def _residuals(curves: Sequence[Curve]) -> Figure:
    figure = _figure(9, 3)
    panel: Any = figure.subplots()
    for number, curve in enumerate(curves):
        for law in curve.laws[:1]:
            chosen = law.weight > 0
            value, _ = law.predicted(curve.points)
            ratio = curve.points.error / value
            x = curve.points.compute
            panel.plot(x, ratio, ".", color=f"C{number}", alpha=0.4)
            panel.plot(x[chosen], ratio[chosen], "o", color=f"C{number}", label=_plain(curve))
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(xscale="log", xlabel="compute", ylabel="measured / fitted")
    if any(curve.laws for curve in curves):
        panel.legend(fontsize=8)
    return figure


def _ladders(curves: Sequence[Curve]) -> Figure:
    """Error over size where several sizes had one budget, else over compute by model."""
    figure = _figure(9, 4)
    panels = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        for budget in sorted({row.samples for row in curve.points.rows}):
            own = [row for row in curve.points.rows if row.samples == budget]
            own.sort(key=lambda row: row.parameters)
            panel.plot(
                [row.parameters for row in own],
                [row.error for row in own],
                ".-",
                label=f"{budget:.3g} samples",
            )
        panel.set(xscale="log", yscale="log", xlabel="weights", title=_plain(curve))
        panel.legend(fontsize=7)
    return figure


def _equal_compute(curves: Sequence[Curve]) -> Figure:
    """Lines of equal compute over weights; a star where a parabola has its minimum."""
    figure = _figure(9, 4)
    panels = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        found = levels(curve.points)
        for number, level in enumerate(found):
            colour = f"C{number}"
            label = f"{level.compute:.2g}"
            panel.plot(level.parameters, level.error, ".-", color=colour, label=label)
            if level.best is not None:
                line = np.interp(np.log(level.best), np.log(level.parameters), level.error)
                panel.plot(level.best, line, "*", color=colour, markersize=11)
        panel.set(xscale="log", yscale="log", xlabel="weights")
        panel.set_title(f"{_plain(curve)}\n{_best_size(found)}", fontsize=9)
        if found:
            panel.legend(fontsize=7, title="compute", title_fontsize=7)
    return figure


def _best_size(found: Sequence[Level]) -> str:
    exponent = growth(found)
    if not found:
        return "no three sizes share a compute"
    if exponent is None:
        return "no minimum between the sizes"
    return f"best weights grow as compute to the {exponent:.2f}"


def _data_against_model(curves: Sequence[Curve]) -> Figure:
    """Samples seen over weights, coloured by error."""
    from matplotlib.colors import LogNorm

    figure = _figure(9, 3.6)
    panels = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    errors = np.concatenate([curve.points.error for curve in curves])
    scale = LogNorm(errors.min(), errors.max() * (1 + 1e-9))
    for panel, curve in zip(panels, curves, strict=True):
        points = curve.points
        shown = panel.scatter(points.parameters, points.samples, c=points.error, norm=scale, s=60)
        panel.set(xscale="log", yscale="log", xlabel="weights", title=_plain(curve))
        panel.set(ylabel="samples seen")
    figure.colorbar(shown, ax=list(panels), label=_metric(curves))
    return figure


def _plain(curve: Curve) -> str:
    """A name as matplotlib shows it, with no formula in it and no underscore that hides a label."""
    return curve.name.replace("$", r"\$").lstrip("_") or "points"


def _in_compute(laws: Sequence[Law]) -> list[Law]:
    return [law for law in laws if law.form.reads == ("compute",)]


def _metric(curves: Sequence[Curve]) -> str:
    return (curves[0].points.rows[0].metric or "error").replace("$", r"\$")


def _picture(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name, quote=True)}" src="data:image/png;base64,{data}">'


def _laws(curves: Sequence[Curve]) -> str:
    rows = [
        (curve.name, law.form.name, key, f"{value:.5g}", f"{low:.4g} to {high:.4g}", _fitted(law))
        for curve in curves
        for law in curve.laws
        for (key, value), (low, high) in zip(
            law.numbers.items(), law.intervals.values(), strict=True
        )
    ]
    used = dict.fromkeys(law.form.name for curve in curves for law in curve.laws)
    meaning = "".join(f"<p>{name}: {html.escape(MEANING[name])}</p>" for name in used)
    head = ("recipe", "law", "number", "value", "95 % interval", "points fitted")
    return f"<h2>Laws</h2>{meaning}{_table(head, rows)}"


def _fitted(law: Law) -> str:
    return f"{int(law.weight.sum())} of {len(law.points)} ({law.frontier})"


def _tests(curves: Sequence[Curve]) -> str:
    rows = [
        (
            curve.name,
            test.law.form.name,
            f"{test.points.compute[at]:.3g}",
            f"{test.decades_beyond[at]:.2f}",
            f"{test.points.error[at]:.4f}",
            f"{test.predicted[at]:.4f} ({test.low[at]:.4f} to {test.high[at]:.4f})",
            f"{test.relative_error[at]:+.1%}",
        )
        for curve in curves
        for test in curve.tests
        for at in range(len(test.points))
    ]
    if not rows:
        return "<h2>Held-out compute</h2><p>Too few points are left without the last decade.</p>"
    head = ("recipe", "law", "compute", "decades beyond", "measured", "predicted", "off by")
    return f"<h2>Held-out compute</h2>{_table(head, rows)}"


def _runs(curves: Sequence[Curve], folder: Path) -> str:
    head = ("recipe", "model", "weights", "samples", "compute", "error", "seed", "files")
    cells = "".join(
        f"<tr>{_cells(_run(row))}<td>{_links(row, folder)}</td></tr>"
        for curve in curves
        for row in curve.points.rows
    )
    names = "".join(f"<th>{name}</th>" for name in head)
    return f"<h2>Runs</h2><table><tr>{names}</tr>{cells}</table>"


def _run(row: Point) -> tuple[str, ...]:
    return (
        row.recipe,
        row.model,
        f"{row.parameters:.4g}",
        f"{row.samples:.4g}",
        f"{row.compute:.4g}",
        f"{row.error:.4f}",
        str(row.seed),
    )


def _links(row: Point, folder: Path) -> str:
    if not row.workdir:
        return ""
    place = os.path.relpath(row.workdir, folder)
    return " ".join(
        f'<a href="{html.escape(f"{place}/{name}", quote=True)}">{shown}</a>'
        for name, shown in (("cell.yaml", "configuration"), ("metrics.jsonl", "metrics"))
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{names}</tr>{''.join(f'<tr>{_cells(row)}</tr>' for row in rows)}</table>"


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td>{html.escape(value)}</td>" for value in values)
