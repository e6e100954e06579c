"""Where the loss jumps, a run goes back to a checkpoint and on behind the samples since.

What is left out is written down before anything else happens, and every checkpoint says what its
run had left out by then. So a kill at any moment comes to the same weights, and a run that is given
the same file from the start never sees those samples.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

from trainer.checkpoint.restored import Restored
from trainer.checkpoint.run_state import Place
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.errors import CheckpointError, NonFiniteLoss
from trainer.log.metrics import MetricLog
from trainer.store.header import write_whole
from trainer.types import Progress

LEFT_OUT = "left_out.json"
_ROBUST = 1.4826  # of a normal distribution: deviation over median distance from the median
_LEAST_SHARE = 0.01


class LeftOut(NamedTuple):
    """Samples that a run does not read: those between a step and a place in their order."""

    step: int
    until: int
    """The sample, counted over all epochs, that step is taken with."""
    why: str


class Spike(Exception):
    """All ranks go back; the program is as it should be."""

    def __init__(self, progress: Progress, why: str) -> None:
        super().__init__(why)
        self.progress = progress


class Spikes:
    """Looks at each step's loss, and knows what is left out. The same on every rank."""

    def __init__(
        self,
        config: RunConfig,
        comm: Comm,
        left_out: Sequence[LeftOut],
        restored: Restored | None,
    ) -> None:
        self._config, self._comm, self._left_out = config.spikes, comm, left_out
        window = config.spikes.window if config.spikes else 0
        state = restored.state if restored else {}
        self._losses = deque[float](state.get("losses", []), maxlen=window)
        self._told = state.get("left_out", [])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": list(self._losses), "left_out": [list(each) for each in self._left_out]}

    def tell(self, log: MetricLog, progress: Progress) -> None:
        """An event for what has been left out since the checkpoint was made."""
        for each in self._left_out:
            if list(each) not in self._told and each.step == progress.step:
                figures = {"why": each.why, "until_sample": each.until}
                log.event(progress, "went back", **figures)

    def behind(self, here: Place) -> Place:
        """Where the next step's samples begin."""
        progress = here.progress
        ends = [each.until for each in self._left_out if each.step == progress.step]
        if not ends or max(ends) <= progress.samples:
            return here
        return Place(replace(progress, samples=max(ends)))

    def look(self, loss: Tensor, progress: Progress) -> None:
        """Spike, on all ranks, where an applied step's loss is one; it is remembered otherwise."""
        if self._config is None:
            return
        mean = float(self._comm.sum(loss.detach().double()) / self._comm.world_size)
        if len(self._losses) == self._config.window:
            limit = highest(self._losses, self._config.deviations)
            if not mean <= limit:
                raise Spike(progress, f"loss {mean:.6g} at step {progress.step}, over {limit:.6g}")
        self._losses.append(mean)

    def instead_of(self, error: NonFiniteLoss, progress: Progress) -> None:
        """Spike where the run is to go on behind what ends it."""
        if self._config is not None:
            raise Spike(progress, str(error)) from error


def highest(losses: Sequence[float] | deque[float], deviations: float) -> float:
    """What is no spike behind these losses."""
    middle = median(losses)
    spread = _ROBUST * median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(spread, _LEAST_SHARE * abs(middle))


def read_left_out(workdir: Path, comm: Comm) -> list[LeftOut]:
    """What rank 0 finds, on every rank; CheckpointError where the file can't be read."""
    found, failure = None, ""
    if comm.is_main and (path := workdir / LEFT_OUT).exists():
        try:
            found = [LeftOut(int(a), int(b), str(c)) for a, b, c in json.loads(path.read_bytes())]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            failure = f"{path} can't be read ({error}); bring it back, or choose another workdir"
    found, failure = comm.broadcast_json([found, failure])
    if failure:
        raise CheckpointError(failure)
    return [LeftOut(*each) for each in found or []]


def is_of_past(restored: Restored, left_out: Sequence[LeftOut]) -> bool:
    """Whether a checkpoint is of a course that the run has left."""
    known = restored.state.get("left_out", [])
    return any(list(each) not in known and restored.step > each.step for each in left_out)


def leave_out(
    spike: Spike, config: RunConfig, comm: Comm, *, saved: Sequence[int], began: int
) -> None:
    """Write down what is left out; `saved` are the steps of this course's checkpoints.

    NonFiniteLoss, on all ranks, where it would be more often than the run may.
    """
    assert config.spikes is not None
    before = read_left_out(config.workdir, comm)
    if len(before) >= config.spikes.most:
        raise NonFiniteLoss(
            f"{spike}; the run has gone back {len(before)} times, which are spikes.most; lower the "
            f"learning rate, or look at the samples before {spike.progress.samples}"
        )
    older = [step for step in saved if step <= spike.progress.step - config.spikes.settle]
    step = max(older, default=min([s for s in saved if s < spike.progress.step], default=began))
    now = [*before, LeftOut(step, spike.progress.samples, str(spike))]
    if comm.is_main:
        config.workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps([list(each) for each in now], indent=1)
        write_whole(config.workdir / LEFT_OUT, text.encode() + b"\n")
    comm.barrier()
