"""Rows of figures as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A first line with what all rows share, then one line per row; `-` where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shared = [n for n in names if len(rows) > 1 and len({str(row.get(n)) for row in rows}) == 1]
    columns = [name for name in names if name not in shared]
    lines = [columns, *([_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    head = ", ".join(f"{name} {_text(rows[0].get(name))}" for name in shared)
    return "\n".join([head, *table] if head else table)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
