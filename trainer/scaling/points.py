"""What a law is fitted to: one point a finished training, with all that it may depend on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from trainer.config import Frozen
from trainer.errors import ConfigError, DataError
from trainer.settings.errors import explain

Array = NDArray[np.float64]


class Point(Frozen):
    """One training that was evaluated."""

    run: str
    """Trainings that share a beginning (cool-downs of one run) have one name, and are drawn
    together by a bootstrap."""
    error: float = Field(gt=0)
    """What should become small: 1 - accuracy as a fraction, or a loss; above zero."""
    compute: float = Field(gt=0)
    """Of the whole training, in the unit of the table."""
    parameters: float = Field(default=float("nan"))
    """Trained weights."""
    samples: float = Field(default=float("nan"))
    """Seen in all, repeated ones as often as they were."""
    unique_samples: float = Field(default=float("nan"))
    """Different ones among them."""
    recipe: str = ""
    """The method, with what was varied of it."""
    model: str = ""
    """Which step of the ladder."""
    corpus: str = ""
    """Where samples come from; subsets of one corpus have its name."""
    schedule: str = ""
    """Of the learning rate. A checkpoint in the middle of a cosine is none of its end."""
    metric: str = ""
    """What the error is of."""
    seed: int = 0
    """Of the training."""
    workdir: str = ""
    """Where the training is, for a link."""


class Points(NamedTuple):
    """Columns of a table of points, sorted by compute and then by error."""

    rows: Sequence[Point]
    error: Array
    compute: Array
    parameters: Array
    samples: Array
    unique_samples: Array
    group: NDArray[np.int64]
    """The number of each point's run."""

    def __len__(self) -> int:
        return len(self.rows)

    def chosen(self, keep: NDArray[np.bool_]) -> Points:
        return columns([row for row, kept in zip(self.rows, keep, strict=True) if kept])


def columns(rows: Iterable[Point]) -> Points:
    """The table of these points. DataError where there is none."""
    ordered = sorted(rows, key=lambda point: (point.compute, point.error))
    if not ordered:
        raise DataError("there is no point to fit a law to; run the study's cells first")
    runs = sorted({point.run for point in ordered})
    number = {run: place for place, run in enumerate(runs)}

    def column(name: str) -> Array:
        return np.array([getattr(point, name) for point in ordered], dtype=np.float64)

    return Points(
        rows=ordered,
        error=column("error"),
        compute=column("compute"),
        parameters=column("parameters"),
        samples=column("samples"),
        unique_samples=column("unique_samples"),
        group=np.array([number[point.run] for point in ordered]),
    )


def read_points(path: Path) -> list[Point]:
    """A CSV whose columns are fields of `Point`; `run` is the row's number where it is not given.

    ConfigError for a column that is none, DataError for a row that is no point.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error
    found = []
    for number, row in enumerate(rows, 2):
        values = {
            "run": f"row {number}",
            **{key: value for key, value in row.items() if value not in ("", "nan")},
        }
        try:
            found.append(Point.model_validate(values))
        except ValidationError as error:
            raise DataError(f"{path}, line {number}: {explain(error, Point)}") from error
    return found


def one_curve(points: Points) -> None:
    """ConfigError where points of several corpora, schedules or metrics would make one curve."""
    for column in ("corpus", "schedule", "metric", "recipe"):
        there = sorted({str(getattr(row, column)) for row in points.rows})
        if len(there) > 1:
            shown = ", ".join(repr(name) for name in there[:4])
            raise ConfigError(
                f"points of {len(there)} {_plural(column)} ({shown}) are no curve; choose one of "
                f"them with {column}=NAME, or compare them"
            )


def _plural(column: str) -> str:
    return {"corpus": "corpora"}.get(column, f"{column}s")
