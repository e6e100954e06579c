"""The files that rank 0 writes of a run, and what of them a resume leaves in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from trainer.log.environment import pages_of_start
from trainer.log.rank_times import Spread
from trainer.log.records import JsonLines, TensorBoard, read_lines
from trainer.log.tracker import WeightsAndBiases
from trainer.types import Progress

PICTURES = "pictures/"
"""Where TensorBoard shows them: a card of their own beside the curves."""
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class Files:
    """All files that rank 0 writes."""

    def __init__(
        self,
        workdir: Path,
        resumed: Progress,
        *,
        phase_begun: bool,
        tracker: WeightsAndBiases | None,
    ) -> None:
        self._tracker = tracker
        workdir.mkdir(parents=True, exist_ok=True)
        last = (resumed.samples, phase_begun)

        def is_past(record: dict[str, Any]) -> bool:
            return (record["samples"], record.get("after_save", False)) <= last

        self._metrics = JsonLines(workdir / METRICS, keep=is_past)
        self._events = JsonLines(workdir / EVENTS, keep=is_past)
        self.tensorboard = TensorBoard(
            workdir / "tensorboard", first_step=resumed.step + 1 + phase_begun
        )
        for name, page in pages_of_start(workdir).items():
            self.tensorboard.text(resumed.step, f"run/{name}", page)

    def step(
        self,
        progress: Progress,
        values: Mapping[str, float],
        timing: Mapping[str, float],
        seconds: float,
        ranks: Spread,
    ) -> None:
        clock = {**timing, "seconds": seconds, "time": time.time(), "ranks": ranks._asdict()}
        self._metrics.append({**_place(progress), "values": values, "timing": clock})
        scalars = {f"train/{name}": value for name, value in values.items()}
        scalars |= {f"speed/{name}": value for name, value in timing.items()}
        scalars |= ranks.scalars() if len(ranks.data_seconds) > 1 else {}
        self._scalars(progress.step, scalars)

    def image(
        self, progress: Progress, name: str, pixels: UInt8[np.ndarray, "height width 3"]
    ) -> None:
        self.tensorboard.image(progress.step, name, pixels)
        if self._tracker is not None:
            self._tracker.image(progress.step, name, pixels)

    def _scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self.tensorboard.scalars(step, scalars)
        if self._tracker is not None:
            self._tracker.scalars(step, scalars)

    def event(
        self,
        progress: Progress,
        name: str,
        figures: Mapping[str, Any],
        *,
        after_save: bool,
        group: str,
    ) -> None:
        """`group` is the heading of its curves, where those of evaluations stand together."""
        place = {**_place(progress), "after_save": after_save, "event": name}
        # `samples` is the run's cursor, by which a resume cuts; an evaluation counts its own.
        named = {"num_samples" if key == "samples" else key: v for key, v in figures.items()}
        self._events.append({**place, **named, "timing": {"time": time.time()}})
        scalars = {
            f"{group}/{key}": value
            for key, value in figures.items()
            if _is_number(value) and key != name  # the number of an episode counts itself
        }
        if scalars:
            # After a save it belongs to the step to come, with which a resume takes it back.
            self._scalars(progress.step + int(after_save), scalars)

    def flush(self) -> None:
        for file in (self._metrics, self._events, self.tensorboard):
            file.flush()

    def close(self) -> None:
        for file in (self._metrics, self._events, self.tensorboard):
            file.close()
        if self._tracker is not None:
            self._tracker.close()


def evaluated(workdir: Path, progress: Progress) -> set[str]:
    """Names of the events at this step, evaluations among them, that a resume leaves in place."""
    path = workdir / EVENTS
    records = read_lines(path) if path.exists() else []
    return {
        str(record.get("event"))
        for record in records
        if record.get("step") == progress.step
        and record.get("samples", 0) <= progress.samples
        and not record.get("after_save")
    }


def _place(progress: Progress) -> dict[str, int]:
    return {"step": progress.step, "samples": progress.samples, "skipped": progress.skipped}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
