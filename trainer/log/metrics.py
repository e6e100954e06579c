"""The numbers of a run: JSON lines, TensorBoard, and what a person sees.

`metrics.jsonl` has one line per logged step: what the training is (equal for equal runs), then
under `timing` what the machine did. `events.jsonl` has evaluations, episodes, checkpoints;
`log.txt` every line that was printed. Only rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from rich.console import Console
from torch import Tensor

from trainer.comm import Comm
from trainer.config import Period
from trainer.errors import ConfigError, TrainerError
from trainer.log.files import EVENTS, METRICS, PICTURES, Files, evaluated
from trainer.log.meter import Meter
from trainer.log.printed import Printed
from trainer.log.rank_times import RankTimes, Spread
from trainer.log.records import plain
from trainer.log.terminal import (
    Display,
    Speed,
    Speedometer,
    display_for,
    episode_line,
    event_line,
)
from trainer.log.tracker import WeightsAndBiases
from trainer.long_work import speaking_to
from trainer.periods import Clock
from trainer.types import Progress

__all__ = ["EVENTS", "METRICS", "MetricLog", "evaluated"]

_EVERY_TEN_STEPS = Period.model_construct(count=10.0, unit="steps")


class _Pending(NamedTuple):
    """A step whose numbers may still be on the device."""

    progress: Progress
    names: tuple[str, ...]
    means: Float64[Tensor, " values"]
    peak_gib: Float64[Tensor, ""]
    speed: Speed
    ranks: Float64[Tensor, "ranks 2"]


class MetricLog:
    """Every rank makes one and calls `put` every step; use it as a context, or `close` it.

    Nothing is written before `resume`, or the first `put` or `event`.
    """

    def __init__(
        self,
        workdir: Path,
        comm: Comm,
        *,
        total_steps: int,
        log_every: Period = _EVERY_TEN_STEPS,
        epoch_size: int | None = None,
        console: Console | None = None,
        meter: Meter | None = None,
        tracker: WeightsAndBiases | None = None,
    ) -> None:
        """`tracker` is rank 0's; others have none."""
        if log_every.unit == "epochs" and epoch_size is None:
            raise ConfigError(f"log_every {log_every}: the size of an epoch is not known here")
        self._workdir = workdir
        self._comm = comm
        self._total_steps = total_steps
        self._log_every = log_every
        self._clock = Clock(comm, epoch_size=epoch_size or 1)
        self._last: Progress | None = None
        self._pending: _Pending | None = None
        self._files: Files | None = None
        self._display: Display | None = None
        self._meter = meter or Meter(comm)
        self._tracker = tracker
        self._rank_times = RankTimes(comm)
        self._printed = Printed(workdir) if comm.is_main else None
        self._speaking = ExitStack()
        if comm.is_main:
            self._display = display_for(console or Console(), total_steps=total_steps)

    def __enter__(self) -> MetricLog:
        """Long work inside tells how far it is in the same place."""
        if self._display is not None and self._printed is not None:
            self._speaking.enter_context(speaking_to(self._display, self._printed.line))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, TrainerError) and self._printed is not None:
            self._printed.line(f"error: {error}")
        self.close()

    def resume(self, progress: Progress, *, phase_begun: bool = False) -> None:
        """Go on from here: lines of later samples are cut, so that none is missing or doubled.

        For none to be missing, call `flush` before each checkpoint is saved. `phase_begun`: it was
        saved behind the events of a phase that begins here, which stay.
        """
        if self._last is not None:
            raise RuntimeError("resume comes before the first put, event or image")
        self._last = progress
        self._saved_at = progress.samples
        self._started = time.monotonic()
        self._speedometer = Speedometer(progress, self._started)
        self._rank_times.begin(progress.step)
        if self._comm.is_main:
            self._files = Files(
                self._workdir, progress, phase_begun=phase_begun, tracker=self._tracker
            )

    def put(
        self,
        progress: Progress,
        values: Mapping[str, float | int | Tensor],
        *,
        wait_seconds: float = 0.0,
        more: Callable[[], Mapping[str, float | int | Tensor]] = dict,
    ) -> None:
        """Take a step's numbers: scalars, each the mean over this rank's samples.

        If logging is due (or this is the last step), they are averaged over the ranks; names and
        order are equal on all. They are read from the device by the next call, when it has long
        finished with them. `wait_seconds` is this rank's total wait for data since the start.
        A line holds the numbers of its step, not a mean over the interval, which a resume in the
        middle of one could not reproduce. `more` gives further numbers, and is called only where
        logging is due, on all ranks.
        """
        self._write_pending()
        last = self._begun()
        speed = self._speedometer.mark(progress, time.monotonic(), wait_seconds=wait_seconds)
        if self._display is not None:
            self._display.step(progress, speed)
        is_due = self._clock.due("log", self._log_every, last, progress)
        if is_due or last.step < progress.step == self._total_steps:
            ranks = self._rank_times.look(progress.step, wait_seconds)
            self._pending = self._reduced(progress, {**values, **more()}, speed, ranks)
        self._last = progress

    def event(self, progress: Progress, name: str, /, **figures: Any) -> None:
        """Something that happened at a step; what rank 0 passes is written and shown."""
        self._begun()
        self._event(progress, name, figures, after_save=progress.samples == self._saved_at)

    def evaluation(self, progress: Progress, label: str, figures: Mapping[str, float]) -> None:
        """An evaluation's figures. After a save too they stay where they are when the run goes on
        from there, and `evaluated` tells that they need not be found again."""
        self._begun()
        self._event(progress, label, figures, after_save=False, group=f"eval: {label}")

    def _event(
        self,
        progress: Progress,
        name: str,
        figures: Mapping[str, Any],
        *,
        after_save: bool,
        group: str | None = None,
    ) -> None:
        if self._files is not None:
            self._files.event(
                progress, name, plain(figures), after_save=after_save, group=group or name
            )
        self.say(
            episode_line(progress, plain(figures))
            if name == "episode" and name in figures
            else event_line(progress, name, plain(figures))
        )

    def image(
        self, progress: Progress, name: str, pixels: UInt8[np.ndarray, "height width 3"]
    ) -> None:
        """A picture for TensorBoard, under `pictures/`; what rank 0 passes is written."""
        self._begun()
        if self._files is not None:
            self._files.image(progress, PICTURES + name, pixels)

    def say(self, text: str) -> None:
        """Show a line; what rank 0 passes is shown."""
        if self._display is not None and self._printed is not None:
            self._display.line(text)
            self._printed.line(text)

    def flush(self) -> None:
        """Everything put so far is in the files and on the disk; call it before each save.

        Events after this call and before the next step will happen again if the run goes on from
        that checkpoint, so their lines say `after_save`, and `resume` cuts them.
        """
        self._write_pending()
        self._saved_at = self._begun().samples
        if self._files is not None and self._printed is not None:
            self._files.flush()
            self._printed.flush()

    def close(self) -> None:
        self._speaking.close()
        self._write_pending()
        if self._files is not None:
            self._files.close()
        if self._display is not None:
            self._display.close()
        if self._printed is not None:
            self._printed.close()
        self._files = self._display = self._printed = None

    def _begun(self) -> Progress:
        if self._last is None:
            self.resume(Progress())
        return self._last or Progress()

    def _reduced(
        self,
        progress: Progress,
        values: Mapping[str, float | int | Tensor],
        speed: Speed,
        ranks: Tensor,
    ) -> _Pending:
        """One collective for all values and one for the memory; nothing waits for the device."""
        numbers = [*values.values(), speed.data_wait]
        stacked = torch.stack([_scalar(number, self._comm.device) for number in numbers])
        means = self._comm.sum(stacked) / self._comm.world_size
        peak = self._comm.max(_scalar(self._meter.peak_gib(), self._comm.device))
        return _Pending(progress, tuple(values), means, peak, speed, ranks)

    def _write_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None or self._files is None or self._display is None:
            return
        *means, data_wait = pending.means.tolist()
        values = dict(zip(pending.names, means, strict=True))
        speed = pending.speed._replace(data_wait=data_wait)
        timing = {
            "samples_per_second": speed.samples_per_second,
            "data_wait": speed.data_wait,
            "seconds_per_step": speed.seconds_per_step,
            "data_seconds_per_step": speed.data_wait * speed.seconds_per_step,
            "peak_gib": pending.peak_gib.item(),
            **self._meter.arithmetic(speed),
        }
        ranks = Spread(*pending.ranks.T.tolist())
        self._files.step(pending.progress, values, timing, time.monotonic() - self._started, ranks)
        loss = values.get("loss", next(iter(values.values()), None))
        shown = self._display.figures(pending.progress, loss, speed)
        if self._printed is not None:
            self._printed.line(shown)
        if slow := ranks.slow(self._rank_times.hosts):
            self.say(f"step {pending.progress.step}  {slow}")


def _scalar(value: float | int | Tensor, device: torch.device) -> Float64[Tensor, ""]:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)
