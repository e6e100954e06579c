"""One rank of a soak: a run whose phases can be seen from outside, with troubles that it was given.

`python -m trainer.programs.struck TROUBLES.json RUN.yaml key=value ...`
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainer.pulse import Pulse
from trainer.types import Batch, Features, Losses


class Troubles(NamedTuple):
    """What a start is given; nothing where empty."""

    phase: str = ""
    """The phase that is told of; of evaluations the first word."""
    times: int = 1
    """The how many-th time."""
    told: str = ""
    """A file that is made when the phase is entered."""
    sync_seconds: float = 0.0
    """A disk that takes so long for every file that must be on it."""
    jumps: tuple[int, int] | None = None
    """Samples of the first epoch, by their place in it, whose loss is fifty times as large."""


def tell_phases(troubles: Troubles) -> None:
    """Make the file when the phase has been entered so often, beside training or not."""
    phase, entered = Pulse.phase, [0]

    @contextmanager
    def seen(self: Pulse, name: str) -> Iterator[None]:
        with phase(self, name):
            entered[0] += name.split()[0] == troubles.phase.split()[0]
            if entered[0] >= troubles.times:
                Path(troubles.told).touch()
            yield

    Pulse.phase = seen  # type: ignore[method-assign]


def slow_disk(seconds: float) -> None:
    sync = os.fsync

    def late(file: int) -> None:
        time.sleep(seconds)
        sync(file)

    os.fsync = late  # type: ignore[assignment]


def loss_that_jumps(first: int, last: int) -> None:
    """Of the recipe `clip`: its loss is another one where the samples of a batch are in between."""
    from trainer.data.stream import Stream
    from trainer.recipes import clip

    take_one, losses = Stream.take_one, clip.Recipe.losses
    begins: dict[int, int] = {}

    def taken(self: Stream) -> Batch:
        batch = take_one(self)
        start = self.share.global_batch * ((self._next - 1) // self.num_micro_batches)
        begins[int(batch.sample_id[0])] = start + self._plan.base
        return batch

    def changed(self: clip.Recipe, features: Features, batch: Batch, step: int) -> Losses:
        found = losses(self, features, batch, step)
        place = begins.get(int(batch.sample_id[0]), -1)
        return Losses.of(contrastive=found.total * 50.0) if first <= place < last else found

    Stream.take_one = taken  # type: ignore[method-assign]
    clip.Recipe.losses = changed  # type: ignore[method-assign]


def struck() -> None:
    troubles = Troubles(**json.loads(Path(sys.argv.pop(1)).read_text()))
    if troubles.told:
        tell_phases(troubles)
    if troubles.sync_seconds:
        slow_disk(troubles.sync_seconds)
    if troubles.jumps is not None:
        loss_that_jumps(*troubles.jumps)
    runpy.run_module("trainer", run_name="__main__")


if __name__ == "__main__":
    struck()
