"""How far a sweep is: every cell's state as the disk shows it, whoever trains it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.checkpoint.lock import holder_of
from trainer.log.metrics import METRICS
from trainer.long_work import duration
from trainer.scaling.cost import Costed

LOOK_SECONDS = 2.0
_TAIL = 8192
"""Bytes at the end of a file of numbers that hold its last line."""


class Seen(NamedTuple):
    """A cell as its folders show it."""

    name: str
    state: str
    """`done`, `trains`, `begun` or `waits`."""
    step: int
    steps: int
    seconds_per_step: float
    """Zero where no step is logged."""
    flops_left: float

    @property
    def flops_per_second(self) -> float:
        if self.state != "trains" or not self.seconds_per_step or self.step >= self.steps:
            return 0.0
        return self.flops_left / (self.steps - self.step) / self.seconds_per_step


def seen(each: Costed) -> Seen:
    """Looks at names of checkpoints and the last logged step alone: no checkpoint is read."""
    cell, places = each.cell, [each.cell.workdir]
    if _saved(cell.workdir) >= cell.steps:
        return Seen(cell.name, "done", cell.steps, cell.steps, 0.0, 0.0)
    if cell.trunk is not None and _saved(cell.workdir) == 0:
        places.append(cell.trunk.workdir)
    step, seconds = max(map(_logged, places))
    first = round(cell.steps * (1 - each.anew))
    step = min(max(step, first), cell.steps)
    left = each.flops * (cell.steps - step) / cell.steps
    trains = any(holder_of(place) for place in places)
    begun = "begun" if step > first else "waits"
    return Seen(cell.name, "trains" if trains else begun, step, cell.steps, seconds, left)


def _saved(workdir: Path) -> int:
    """The step of the newest checkpoint by its name; a training reads the bytes."""
    found = [re.fullmatch(r"step-(\d+)(-\d+)?", path.name) for path in _checkpoints(workdir)]
    return max((int(match[1]) for match in found if match), default=0)


def _checkpoints(workdir: Path) -> list[Path]:
    folder = workdir / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []


def _logged(workdir: Path) -> tuple[int, float]:
    """(step, seconds per step) of the last line of numbers; zeros where there is none."""
    try:
        with (workdir / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            line = json.loads(file.read().splitlines()[-1])
        return int(line["step"]), float(line["timing"]["seconds_per_step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0, 0.0


def seconds_left(found: Sequence[Seen]) -> float | None:
    """Of the whole study at the speed of the cells that train now; None where none does."""
    speed = sum(each.flops_per_second for each in found)
    return sum(each.flops_left for each in found) / speed if speed else None


def table_of(found: Sequence[Seen], *, most: int = 40) -> Group:
    """All cells, those that train first, and a line of what is left."""
    order = {"trains": 0, "begun": 1, "waits": 2, "done": 3}
    table = Table("cell", "state", "step", box=None, pad_edge=False)
    for each in sorted(found, key=lambda each: order[each.state])[:most]:
        table.add_row(Text(each.name), each.state, f"{each.step}/{each.steps}")
    done = sum(each.state == "done" for each in found)
    left = seconds_left(found)
    rest = "nothing trains now" if left is None else f"{duration(left)} left"
    if done == len(found):
        rest = "nothing left"
    more = "" if len(found) <= most else f" ({len(found) - most} more not shown)"
    return Group(table, Text(f"{done} of {len(found)} cells done{more}, {rest}"))


def told_table(every: Sequence[Costed]) -> str:
    """The table in lines."""
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table_of([seen(each) for each in every], most=len(every)))
    return captured.get().rstrip("\n")


class LiveTable:
    """Draws the table over and over while a sweep runs; on a terminal only."""

    def __init__(self, every: Sequence[Costed]) -> None:
        self._every, self._over = every, Event()
        self._console = Console()
        self._thread = Thread(target=self._draw, daemon=True)

    def __enter__(self) -> LiveTable:
        if self._console.is_terminal:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _draw(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while not self._over.is_set():
                live.update(table_of([seen(each) for each in self._every]), refresh=True)
                self._over.wait(LOOK_SECONDS)


class TimeLeft:
    """Says after each cell how long the others will take, by FLOPs."""

    def __init__(self, count: int, to_do: Sequence[Costed], say: Callable[[str], None]) -> None:
        self.say, self._count, self._to_do = say, count, len(to_do)
        self._flops, self._done, self._ended = sum(e.flops_anew for e in to_do), 0.0, 0
        self._began = time.monotonic()

    @property
    def num_done(self) -> int:
        return self._count - self._to_do + self._ended

    def ended(self, each: Costed, failure: str) -> None:
        self._done += each.flops_anew
        self._ended += 1
        seconds = time.monotonic() - self._began
        rest = seconds * (self._flops - self._done) / max(self._done, 1.0)
        state = f"failed: {failure}" if failure else "done"
        self.say(
            f"{self.num_done}/{self._count}  {each.cell.name}  {state}  {rest / 60:.0f} min left"
        )
