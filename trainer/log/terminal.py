"""What a person sees of a run: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from trainer.addresses import without_secrets
from trainer.long_work import duration
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

    is_live = False

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self._total_steps = total_steps

    def step(self, progress: Progress, speed: Speed) -> None:
        """Called every step; only a bar moves that often."""

    def figures(self, progress: Progress, loss: float | None, speed: Speed) -> str:
        """Called once per logging interval; the line."""
        text = _line(progress, self._total_steps, loss, speed)
        self.line(text)
        return text

    def line(self, text: str) -> None:
        self._console.file.write(without_secrets(text) + "\n")
        self._console.file.flush()

    def live(self, text: str) -> None:
        """Nothing is drawn over in a file."""

    def close(self) -> None:
        pass


class LiveBar:
    """A bar that stays at the bottom while lines scroll above it."""

    is_live = True

    def __init__(self, console: Console, total_steps: int) -> None:
        self._total_steps = total_steps
        self._loss: float | None = None
        self._shown = ""
        columns = (BarColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Bar(*columns, console=console, refresh_per_second=4, transient=False)
        self._task: TaskID = self._bar.add_task("", total=total_steps)
        self._bar.start()

    def step(self, progress: Progress, speed: Speed) -> None:
        self._shown = _line(progress, self._total_steps, self._loss, speed)
        self._bar.update(self._task, completed=progress.step, description=self._shown)

    def figures(self, progress: Progress, loss: float | None, speed: Speed) -> str:
        self._loss = loss
        self.step(progress, speed)
        return _line(progress, self._total_steps, loss, speed)

    def live(self, text: str) -> None:
        """What else goes on, in the bar's own line."""
        self._bar.update(self._task, description=text or self._shown)

    def line(self, text: str) -> None:
        self._bar.console.print(
            without_secrets(text), markup=False, highlight=False, soft_wrap=True
        )

    def close(self) -> None:
        self._bar.stop()


Display = PlainLines | LiveBar


def display_for(console: Console, *, total_steps: int) -> Display:
    """A bar on a terminal that can draw one, plain lines elsewhere."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveBar(console, total_steps)
    return PlainLines(console, total_steps)


def event_line(progress: Progress, name: str, figures: Mapping[str, Any]) -> str:
    """`step 120  birds: top1 41.2 (chance 0.5), samples 205`, without lists and tables.

    Of many figures the first ten; `events.jsonl` has all.
    """
    shown = [
        _told(key, value, figures)
        for key, value in figures.items()
        if not isinstance(value, (list, dict)) and not _is_chance_of_another(key, figures)
    ]
    if len(shown) > MOST_FIGURES:
        shown = [*shown[:MOST_FIGURES], f"and {len(shown) - MOST_FIGURES} more in events.jsonl"]
    return f"step {progress.step}  {name}" + (": " + ", ".join(shown) if shown else "")


def _told(key: str, value: Any, figures: Mapping[str, Any]) -> str:
    chance = figures.get(f"chance_{key}", figures.get("chance") if key in _ONE_CHANCE else None)
    beside = "" if chance is None else f" (chance {chance:.4g})"
    return (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}") + beside


_ONE_CHANCE = ("top1", "mean_per_class")
"""Figures whose floor is called `chance` and no more."""


def _is_chance_of_another(key: str, figures: Mapping[str, Any]) -> bool:
    if key == "chance":
        return any(name in figures for name in _ONE_CHANCE)
    return key.startswith("chance_") and key.removeprefix("chance_") in figures


def episode_line(progress: Progress, figures: Mapping[str, Any]) -> str:
    """`step 120  episode 3: clustered in 12 s; image and text clusters agree by 0.41 (NMI)`, of
    whatever other figures there are; `events.jsonl` has all."""
    seconds = [value for key, value in figures.items() if key.startswith("seconds_")]
    said = [f"clustered in {duration(sum(seconds))}"] if seconds else ["no prototypes"]
    if (agreed := figures.get("nmi_image_text")) is not None:
        said.append(f"image and text clusters agree by {agreed:.2f} (NMI)")
    spread = [f"{figures[k]:.3g} ({k.removesuffix('_objective')})" for k in _objectives(figures)]
    if spread:
        said.append(f"mean squared distance to the own cluster {', '.join(spread)}")
    return f"step {progress.step}  episode {figures['episode']}: {'; '.join(said)}"


def _objectives(figures: Mapping[str, Any]) -> list[str]:
    return [key for key in figures if key.endswith("_objective")]


def _line(progress: Progress, total_steps: int, loss: float | None, speed: Speed) -> str:
    parts = [f"step {progress.step}/{total_steps}", *_figures(loss, speed)]
    return "  ".join([*parts, f"ETA {_eta(progress, total_steps, speed)}"])


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
