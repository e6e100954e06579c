"""Build everything from one configuration, then train. This page is the whole program."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing, suppress
from functools import partial
from typing import NamedTuple

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.lock import sole_user
from trainer.checkpoint.run_state import Place, branched_from, place_of
from trainer.comm import Comm
from trainer.config import EvalConfig, RunConfig
from trainer.errors import CheckpointError, DataError, TrainerError
from trainer.log.printed import note, told_to_log
from trainer.meeting import read_place
from trainer.pulse import PULSE
from trainer.running.built import Run, built
from trainer.running.looks import due_looks, look, owed_looks
from trainer.running.saves import save, save_if_possible, save_what_is_not
from trainer.running.spikes import Spike, is_of_past, leave_out, read_left_out
from trainer.running.steps import step_of, with_phase
from trainer.stop import Stopped, StopRequest
from trainer.types import Progress
from trainer.watch.watch import Watch


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    progress: Progress
    finished: bool
    """False: stopped by a signal; the same command goes on from here."""
    steps_now: int
    """Steps taken by this call."""
    evaluations_owed: int = 0
    """Evaluations that an earlier call had left and this one made."""


def train(config: RunConfig) -> Outcome:
    """Train to `config.steps`, going on from the newest good checkpoint in the workdir.

    What ends a run ends it after a save: a signal, an error that all ranks know, an evaluation of
    the last step that fails (a DataError; the same command makes it again).
    """
    comm = Comm.from_environment(timeout_seconds=config.comm_timeout_seconds)
    with _watch(config), sole_user(config.workdir, comm), StopRequest() as stop:
        checkpoints = Checkpointer(
            *(config.workdir / "checkpoints", comm),
            keep=config.keep_checkpoints,
            second=config.second_copy,
        )
        while (outcome := _course(config, comm, checkpoints, stop)) is None:
            pass  # the loss jumped: on from a checkpoint before
        return outcome


def _course(
    config: RunConfig, comm: Comm, checkpoints: Checkpointer, stop: StopRequest
) -> Outcome | None:
    """From the newest checkpoint on; None where the loss jumps, and it is written down from where
    to go on."""
    left_out = read_left_out(config.workdir, comm)
    own = checkpoints.latest(passed_over=partial(is_of_past, left_out=left_out))
    restored = own or branched_from(config, comm)
    start = place_of(restored) if restored else Place(Progress())
    owed = owed_looks(config, own, comm) if own else []
    if restored and restored.step >= config.steps and not owed:
        return Outcome(start.progress, finished=True, steps_now=0)
    try:
        with told_to_log(config.workdir, comm):
            check = partial(stop.check, comm)
            run = built(config, comm, checkpoints, restored, check, left_out)
    except Stopped:
        return Outcome(start.progress, finished=False, steps_now=0)
    with closing(run.stream), run.log:
        try:
            return _train(run, start, owed, saved=start if own else None)
        except Spike as spike:
            with suppress(CheckpointError):
                run.checkpoints.finish()
            saved, began = checkpoints.steps(), start.progress.step
            with PULSE.phase("going back"):
                leave_out(spike, config, comm, saved=saved, began=began)
            return None


def _watch(config: RunConfig) -> Watch:
    """Outermost: what ends one rank ends the others too, whatever they wait for."""
    say = partial(note, config.workdir)
    return Watch(read_place(os.environ), config.workdir, config.hang_seconds, note=say)


def _train(run: Run, here: Place, owed: Sequence[EvalConfig], saved: Place | None) -> Outcome:
    start, last, num_owed = here.progress.step, run.config.steps, len(owed)
    try:
        failed = look(run, here.progress, owed)
        while here.progress.step < last:
            here = _behind_what_is_left_out(run, here)
            if run.recipe.phase_due(here.progress) and not here.phase_begun:
                here = with_phase(run, here.progress)
            before, here = here.progress, Place(step_of(run, here.progress))
            owed = due_looks(run, before, here.progress)
            save_due = run.clock.due("save", run.config.save_every, before, here.progress)
            run.check()
            if here.progress.step == last:
                saved = save(run, here, owed)
                run.checkpoints.finish()
            elif save_due:
                saved = save_if_possible(run, here, owed) or saved
            failed = look(run, here.progress, owed)
            owed = ()
    except Stopped:
        save_what_is_not(run, here, owed, saved)
        return Outcome(here.progress, finished=False, steps_now=here.progress.step - start)
    except TrainerError as error:
        if error.on_all_ranks:
            save_what_is_not(run, here, owed, saved)
        raise
    if failed:
        raise DataError(
            f"{'; '.join(failed)}; step {last} is saved, and the same command evaluates it again"
        )
    steps = here.progress.step - start
    return Outcome(here.progress, finished=True, steps_now=steps, evaluations_owed=num_owed)


def _behind_what_is_left_out(run: Run, here: Place) -> Place:
    there = run.spikes.behind(here)
    if there != here:
        run.stream.seek(there.progress.samples)
    return there
