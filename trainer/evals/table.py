"""A table of evaluation figures in which no number stands without its floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

from rich.console import Console
from rich.table import Table

from trainer.config import OodScore
from trainer.evals.retrieval import CUTOFFS

_NOT_SHOWN = tuple(f"_{key}" for key in ("aupr_in", "aupr_out", "error"))
"""Ends of the names of figures that stand in records and not in the table."""
_FLOORS = (
    {
        "top1": ("chance", "pixel_1nn"),
        "top5": ("chance_top5", "pixel_5nn"),
        "mean_per_class": ("chance", "pixel_1nn_mean_per_class"),
        "nearest": ("chance", "pixel_1nn"),
    }
    | {
        f"{way}_r{k}": (f"chance_{way}_r{k}", "")
        for way in ("image_to_text", "text_to_image")
        for k in CUTOFFS
    }
    | {
        f"{score}_{key}": (f"chance_{key}", "")
        for score in get_args(OodScore)
        for key in ("auroc", "fpr95")
    }
)
"""Measured figures, and the figures that are their floors: chance, and nearest pixels."""


class Row(NamedTuple):
    label: str
    figure: str
    percent: float
    chance: float | None
    pixels: float | None
    remarks: str


def table_rows(results: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One row per measured figure; sizes and chosen settings are remarks on the first.

    Figures of one language end in its name, as `image_to_text_r1/de`, and stand together.
    """
    rows = []
    for label, figures in results.items():
        for suffix in dict.fromkeys("".join(name.partition("/")[1:]) for name in figures):
            remarks = _remarks(figures, suffix)
            for figure, floors in _FLOORS.items():
                if figure + suffix in figures:
                    chance, pixels = (figures.get(floor + suffix) for floor in floors)
                    measured = figures[figure + suffix]
                    rows.append(Row(label, figure + suffix, measured, chance, pixels, remarks))
                    label = remarks = ""
    return rows


def format_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Plain aligned text."""
    cells = [_HEADER, *(_cells(row) for row in table_rows(results))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in _NUMERIC else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def show_table(results: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """A drawn table on a terminal, plain text elsewhere."""
    if not console.is_terminal:
        console.print(format_table(results), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table()
    for column, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if column in _NUMERIC else "left")
    for row in table_rows(results):
        table.add_row(*_cells(row), end_section=False)
    console.print(table)


_HEADER = ("evaluation", "figure", "%", "chance", "pixels 1-NN", "")
_NUMERIC = (2, 3, 4)


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (row.percent, row.chance, row.pixels)
    shown = ("-" if value is None else f"{value:.2f}" for value in numbers)
    return (row.label, row.figure.replace("_", " "), *shown, row.remarks)


def _remarks(figures: Mapping[str, float], suffix: str) -> str:
    floors = {name for pair in _FLOORS.values() for name in pair}
    own = [name for name in figures if name.endswith(suffix) and name.count("/") == bool(suffix)]
    plain = [name.removesuffix(suffix) for name in own]
    rest = [
        name
        for name in plain
        if name not in floors and name not in _FLOORS and not name.endswith(_NOT_SHOWN)
    ]
    return ", ".join(f"{name.replace('_', ' ')} {figures[name + suffix]:g}" for name in rest)
