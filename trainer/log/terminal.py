"""What a person sees of a run: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from trainer.types import Progress

MOST_FIGURES = 10
"""Of an event on one line of the terminal."""


class Speed(NamedTuple):
    """How fast the run has been of late."""

    samples_per_second: float
    """Over all ranks."""
    data_wait: float
    """Share of the time that this rank spent waiting for data, 0 to 1."""
    seconds_per_step: float


class Speedometer:
    """Speed over the last `window` steps."""

    def __init__(self, start: Progress, now: float, *, window: int = 50) -> None:
        self._marks = deque([(now, start.step, start.samples, 0.0)], maxlen=window + 1)

    def mark(self, progress: Progress, now: float, *, wait_seconds: float) -> Speed:
        """`wait_seconds` is the total since the start."""
        self._marks.append((now, progress.step, progress.samples, wait_seconds))
        seconds, steps, samples, wait = (
            last - first for first, last in zip(self._marks[0], self._marks[-1], strict=True)
        )
        seconds = max(seconds, 1e-9)
        return Speed(
            samples_per_second=samples / seconds,
            data_wait=min(max(wait / seconds, 0.0), 1.0),
            seconds_per_step=seconds / steps if steps else math.nan,
        )


class PlainLines:
    """One line per logging interval, for files and pipes."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def step(self, progress: Progress, speed: Speed) -> None:
        """Called every step; only a bar moves that often."""

    def figures(self, progress: Progress, loss: float | None, speed: Speed) -> None:
        """Called once per logging interval."""
        parts = [f"step {progress.step}/{self._total_steps}", *_figures(loss, speed)]
        self.line("  ".join([*parts, f"ETA {_eta(progress, self._total_steps, speed)}"]))

    def line(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()

    def close(self) -> None:
        pass


class LiveBar:
    """A bar that stays at the bottom while lines scroll above it."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._total_steps = total_steps
        self._loss: float | None = None
        columns = (BarColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Bar(*columns, console=console, refresh_per_second=4, transient=False)
        self._task: TaskID = self._bar.add_task("", total=total_steps)
        self._bar.start()

    def step(self, progress: Progress, speed: Speed) -> None:
        parts = [f"step {progress.step}/{self._total_steps}", *_figures(self._loss, speed)]
        parts.append(f"ETA {_eta(progress, self._total_steps, speed)}")
        self._bar.update(self._task, completed=progress.step, description="  ".join(parts))

    def figures(self, progress: Progress, loss: float | None, speed: Speed) -> None:
        self._loss = loss
        self.step(progress, speed)

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


Display = PlainLines | LiveBar


def display_for(console: Console, *, total_steps: int) -> Display:
    """A bar on a terminal that can draw one, plain lines elsewhere."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveBar(console, total_steps)
    return PlainLines(console, total_steps)


def event_line(progress: Progress, name: str, figures: Mapping[str, Any]) -> str:
    """`step 120  zero_shot: top1 0.412, top5 0.7`, without figures that are lists or tables.

    Of many figures the first ten; `events.jsonl` has all.
    """
    shown = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
        if not isinstance(value, (list, dict))
    ]
    if len(shown) > MOST_FIGURES:
        shown = [*shown[:MOST_FIGURES], f"and {len(shown) - MOST_FIGURES} more in events.jsonl"]
    return f"step {progress.step}  {name}" + (": " + ", ".join(shown) if shown else "")


def duration(seconds: float) -> str:
    """`45 s`, `2 min 10 s`, `3 h 5 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    for size, unit, smaller_size, smaller_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit} {rest} {smaller_unit}"
    return f"{whole} s"


def _figures(loss: float | None, speed: Speed) -> list[str]:
    return [
        *([f"loss {loss:.4g}"] if loss is not None else []),
        f"{speed.samples_per_second:.3g} samples/s"
        if speed.samples_per_second < 100
        else f"{speed.samples_per_second:.0f} samples/s",
        f"data wait {speed.data_wait:.0%}".replace("%", " %"),
    ]


def _eta(progress: Progress, total_steps: int, speed: Speed) -> str:
    return duration(max(total_steps - progress.step, 0) * speed.seconds_per_step)
