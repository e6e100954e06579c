"""Build everything from one configuration, then train. This page is the whole program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.lock import sole_user
from trainer.checkpoint.restored import Restored
from trainer.checkpoint.room import bytes_needed, check_room
from trainer.checkpoint.run_state import (
    Place,
    frozen_digest,
    load_rest,
    load_weights,
    place_of,
    save_state,
    shards_of,
    undone_unless_done,
)
from trainer.comm import Comm, agreed, stop_together
from trainer.config import EvalConfig, RunConfig, Weights, micro_batches
from trainer.data.labels import ClusterLabels
from trainer.data.stream import Stream
from trainer.engine.accumulate import accumulate
from trainer.engine.schedule import warmup_cosine
from trainer.engine.zero import Engine, persistent_buffers
from trainer.engine.zero_file import Decided, completed
from trainer.errors import CheckpointError, ConfigError, DataError, TrainerError
from trainer.evals import EvalContext, Result, by_weights, evaluate_each
from trainer.evals.check import check_evaluations
from trainer.log.environment import write_start
from trainer.log.meter import Meter
from trainer.log.metrics import MetricLog, evaluated
from trainer.log.opening_lines import describe
from trainer.log.printed import note, told_to_log
from trainer.log.skipped_step import SkippedSteps, explain_skip, one_line
from trainer.log.tracker import tracker_for
from trainer.long_work import tell
from trainer.meeting import read_place
from trainer.parts.averaged_weights import AveragedWeights
from trainer.periods import Clock
from trainer.pictures.run import training_pictures
from trainer.pulse import PULSE
from trainer.recipe import Recipe, attach_parts, load_recipe, prepared
from trainer.run import (
    add_average,
    context_of,
    eval_context,
    loading_notes,
    refuse_other_data,
    refuse_text_evals,
    stream_of,
    tokenizer_of,
)
from trainer.stop import Check, Stopped, StopRequest, go_on
from trainer.types import Batch, Features, Losses, Progress
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


class Run(NamedTuple):
    """What a run is made of."""

    config: RunConfig
    comm: Comm
    check: Check
    tokenizer: PreTrainedTokenizerFast | None
    stream: Stream
    recipe: Recipe
    frozen: str
    engine: Engine
    average: AveragedWeights | None
    checkpoints: Checkpointer
    log: MetricLog
    meter: Meter
    clock: Clock
    skipped: SkippedSteps

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Of the model's state: what a forward pass in training changes."""
        return persistent_buffers(self.engine.module)

    def encode(self, batch: Batch) -> Features:
        """The engine's, for what takes long: a stop is looked at before each batch."""
        self.check()
        return self.engine.encode(batch)

    def running_on(self, weights: Weights) -> AbstractContextManager[None]:
        """Inside, `encode` uses these weights; all ranks enter and leave, and take no step."""
        if weights == "trained":
            return nullcontext()
        assert self.average is not None, "the configuration refuses it"
        return self.average.applied()


def train(config: RunConfig) -> Outcome:
    """Train to `config.steps`, going on from the newest good checkpoint in the workdir.

    What ends a run ends it after a save: a signal, an error that all ranks know, an evaluation of
    the last step that fails (a DataError; the same command makes it again).
    """
    comm = Comm.from_environment(timeout_seconds=config.comm_timeout_seconds)
    with _watch(config), sole_user(config.workdir, comm), StopRequest() as stop:
        checkpoints = Checkpointer(
            config.workdir / "checkpoints", comm, keep=config.keep_checkpoints
        )
        restored = checkpoints.latest()
        start = place_of(restored) if restored else Place(Progress())
        owed = _owed(config, restored, comm) if restored else []
        if restored and restored.step >= config.steps and not owed:
            return Outcome(start.progress, finished=True, steps_now=0)
        try:
            with told_to_log(config.workdir, comm):
                run = _built(config, comm, checkpoints, restored, partial(stop.check, comm))
        except Stopped:
            return Outcome(start.progress, finished=False, steps_now=0)
        with closing(run.stream), run.log:
            return _train(run, start, owed, saved=start if restored else None)


def _watch(config: RunConfig) -> Watch:
    """Outermost: what ends one rank ends the others too, whatever they wait for."""
    say = partial(note, config.workdir)
    return Watch(read_place(os.environ), config.workdir, config.hang_seconds, note=say)


def _train(run: Run, here: Place, owed: Sequence[EvalConfig], saved: Place | None) -> Outcome:
    start, last, num_owed = here.progress.step, run.config.steps, len(owed)
    try:
        failed = _look(run, here.progress, owed)
        while here.progress.step < last:
            if run.recipe.phase_due(here.progress) and not here.phase_begun:
                here = _with_phase(run, here.progress)
            before, here = here.progress, Place(_step(run, here.progress))
            owed = _due(run, before, here.progress)
            save_due = run.clock.due("save", run.config.save_every, before, here.progress)
            run.check()
            if here.progress.step == last:
                saved = _save(run, here, owed)
            elif save_due:
                saved = _save_if_possible(run, here, owed) or saved
            failed = _look(run, here.progress, owed)
            owed = ()
    except Stopped:
        _save_what_is_not(run, here, owed, saved)
        return Outcome(here.progress, finished=False, steps_now=here.progress.step - start)
    except TrainerError as error:
        if error.on_all_ranks:
            _save_what_is_not(run, here, owed, saved)
        raise
    if failed:
        raise DataError(
            f"{'; '.join(failed)}; step {last} is saved, and the same command evaluates it again"
        )
    steps = here.progress.step - start
    return Outcome(here.progress, finished=True, steps_now=steps, evaluations_owed=num_owed)


def _built(
    config: RunConfig,
    comm: Comm,
    checkpoints: Checkpointer,
    restored: Restored | None,
    check: Check,
) -> Run:
    """Everything that a run needs, as it was at the checkpoint; mistakes are told on the way."""
    micro_batch, accumulation = micro_batches(
        global_batch=config.global_batch, micro_batch=config.micro_batch, world_size=comm.world_size
    )
    decided = Decided(micro_batch, accumulation, config.optim)
    agreed(comm, lambda: completed(config.deepspeed, comm, decided))
    agreed(comm, lambda: refuse_text_evals(config))
    tracker = agreed(comm, lambda: tracker_for(config, comm))
    if config.evals:
        tell(f"looking into the data of {len(config.evals)} evaluations")
    check_evaluations(config.evals, comm, dim=config.recipe.model.embed_dim)
    tell(f"opening {config.data.train}")
    tokenizer = tokenizer_of(config, comm)
    before = shards_of(restored)
    stream = agreed(
        comm,
        lambda: stream_of(config, comm, tokenizer, micro_batch=micro_batch, before=before),
    )
    agreed(comm, lambda: refuse_other_data(config, stream.shard_lines))
    tell(f"building the model of {config.recipe.name}")
    shape = restored.state.get("shape") if restored else None
    with PULSE.phase("building the model"):
        recipe = load_recipe(config.recipe, context_of(config, comm, tokenizer, check, shape))
    recipe.model.gradient_checkpointing(config.gradient_checkpointing)
    parameters, frozen = recipe.model.count_parameters(), frozen_digest(recipe.model)
    averaged = config.average is not None
    needed = bytes_needed(restored, parameters["trained"], averaged=averaged)
    check_room(config.workdir / "checkpoints", comm, needed=needed)
    if restored:
        PULSE.mark()
        tell(f"reading {restored.folder}")
        load_weights(restored, recipe.model, config, frozen=frozen)
    engine = Engine(
        recipe.model,
        config.optim,
        comm,
        deepspeed_config=config.deepspeed,
        micro_batch=micro_batch,
        accumulation=accumulation,
    )
    average = add_average(recipe, config)
    attach_parts(recipe, engine)
    start = Place(Progress())
    if restored:
        load_rest(restored, engine, recipe, stream.take_one())
        start = place_of(restored)
    stream.seek(start.progress.samples)
    write_start(config, comm, step=start.progress.step)
    meter = Meter(comm, samples_per_micro_batch=micro_batch, peak_tflops=config.device_peak_tflops)
    log = MetricLog(
        config.workdir,
        comm,
        total_steps=config.steps,
        log_every=config.log_every,
        epoch_size=stream.epoch_size,
        meter=meter,
        tracker=tracker,
    )
    log.resume(start.progress, phase_begun=start.phase_begun)
    notes = loading_notes(config, recipe)
    size, stage = comm.world_size, engine.stage
    log.say(describe(config, parameters, stream, world_size=size, stage=stage, notes=notes))
    if restored:
        log.say(f"going on from step {restored.step} in {restored.folder}")
    return Run(
        *(config, comm, check, tokenizer, stream, recipe, frozen, engine, average),
        checkpoints=checkpoints,
        log=log,
        meter=meter,
        clock=Clock(comm, epoch_size=stream.epoch_size),
        skipped=SkippedSteps(limit=config.max_skipped_steps),
    )


def _with_phase(run: Run, progress: Progress) -> Place:
    with PULSE.phase("episode"), undone_unless_done(run.buffers):
        figures = run.recipe.begin_phase(progress, run.encode, run.stream)
    run.log.event(progress, "episode", **figures)
    return Place(progress, phase_begun=True)


def _step(run: Run, progress: Progress) -> Progress:
    """One step and its numbers in the log. A stop between its micro-batches undoes it."""
    with PULSE.phase("step"), undone_unless_done(run.buffers):
        batches = _taken(run)
        run.meter.watch(run.engine.module)
        said: dict[str, Tensor] = {}
        losses, applied = train_step(
            run.engine, run.recipe, batches, progress, run.config, check=run.check, said=said
        )
    progress = progress.advance(samples=run.config.global_batch, applied=applied)
    if applied:
        run.skipped.none()
    else:
        why = one_line(explain_skip(run.engine, batches, losses))
        run.log.event(progress, "skipped", why=why)
        run.skipped.one_more(why)
    numbers = {"loss": losses.total, **losses, "gradient_norm": run.engine.gradient_norm, **said}

    def more() -> dict[str, float | Tensor]:
        return {**run.engine.learning_rates(), **run.engine.tower_norms()}

    run.log.put(progress, numbers, wait_seconds=run.stream.wait_seconds, more=more)
    return progress


def _taken(run: Run) -> list[Batch]:
    """This rank's micro-batches of the next step; where a rank has none, DataError on all."""
    batches: list[Batch] = []
    failure = None
    for _ in range(run.stream.num_micro_batches):
        run.check()
        try:
            batches += [] if failure else [run.stream.take_one()]
        except DataError as error:
            failure = str(error)
    stop_together(run.comm, failure)
    return batches


def _due(run: Run, before: Progress, progress: Progress) -> list[EvalConfig]:
    """The evaluations of this step. The end of a run is always evaluated."""
    ends = progress.step == run.config.steps
    return [
        entry
        for entry in run.config.evals
        if run.clock.due(entry.label, entry.every, before, progress) or ends
    ]


def _look(run: Run, progress: Progress, due: Sequence[EvalConfig]) -> list[str]:
    """Evaluate and draw what is due. Returns what failed: an event, for training goes on."""
    context = eval_context(run.config, run.comm, run.tokenizer, run.check)
    failed, groups = [], run.recipe.shown_groups()
    for weights, entries in by_weights(due):
        with run.running_on(weights):
            found = []
            for result in evaluate_each(entries, run.encode, context):
                if _logged(run, progress, result):
                    found.append(result.config)
                else:
                    failed.append(f"evaluation {result.config.label} failed: {result.failure}")
            _draw(run, progress, found, context, groups)
        groups = None if found else groups  # are drawn once
    return failed


def _logged(run: Run, progress: Progress, result: Result) -> bool:
    """Whether an evaluation found something; what, or why it did not, is in the log."""
    label = result.config.label
    if result.failure is None:
        run.log.evaluation(progress, label, result.figures)
    else:
        run.log.event(progress, "not evaluated", evaluation=label, why=result.failure)
    return result.failure is None


def _draw(
    run: Run,
    progress: Progress,
    found: Sequence[EvalConfig],
    context: EvalContext,
    groups: ClusterLabels | None,
) -> None:
    for name, picture in training_pictures(groups, run.config, found, run.encode, context):
        if isinstance(picture, str):
            run.log.event(progress, "not drawn", picture=name, why=picture)
        else:
            run.log.image(progress, name, picture)


def _owed(config: RunConfig, restored: Restored, comm: Comm) -> list[EvalConfig]:
    """Evaluations of the restored step that the run before did not come to."""
    done = sorted(evaluated(config.workdir, place_of(restored).progress)) if comm.is_main else []
    done = comm.broadcast_json(done)
    was_due = restored.state.get("evaluations_due", [])
    return [
        entry
        for entry in config.evals
        if (entry.label in was_due or restored.step >= config.steps) and entry.label not in done
    ]


def _save(run: Run, here: Place, due: Sequence[EvalConfig]) -> Place:
    run.log.flush()
    labels = [entry.label for entry in due]
    save_state(
        *(run.checkpoints, run.engine, run.recipe, here, run.config),
        frozen=run.frozen,
        shards=[*run.stream.shard_lines, *run.stream.folder_lines],
        evaluations_due=labels,
    )
    return here


def _save_if_possible(run: Run, here: Place, due: Sequence[EvalConfig]) -> Place | None:
    """On a full disk training goes on; the next save may find room."""
    try:
        return _save(run, here, due)
    except CheckpointError as error:
        run.log.event(here.progress, "not saved", why=str(error))
        return None


def _save_what_is_not(
    run: Run, here: Place, due: Sequence[EvalConfig], saved: Place | None
) -> None:
    if here != saved:
        _save(run, here, due)


def train_step(
    engine: Engine,
    recipe: Recipe,
    batches: Sequence[Batch],
    progress: Progress,
    config: RunConfig,
    *,
    check: Check = go_on,
    said: dict[str, Tensor] | None = None,
) -> tuple[Losses, bool]:
    """Take one optimizer step over this rank's micro-batches.

    Every loss is a mean over this rank's samples; ZeRO averages gradients over ranks and each
    Part divides its own. Returns the losses and whether the step was applied: it is not, on any
    rank and in any Part, if a gradient on some rank was not finite. Where `check` raises, between
    micro-batches, nothing was applied either. `said` takes what the model and the gradients say
    beside the losses (`accumulate`).
    """

    def loss_of(features: Features, batch: Batch) -> Losses:
        losses = recipe.losses(features, batch, progress.step)
        if not isinstance(losses, Losses):
            raise ConfigError(
                f"losses of recipe {config.recipe.name} returned a {type(losses).__name__}; "
                "return Losses.of(name=value), or Losses({name: (value, weight)})"
            )
        return losses

    def all_finite() -> bool:
        votes = [part.gradients_finite() for part in recipe.parts.values()]
        asked = any(vote is not None for vote in votes)
        return not (asked and engine.comm.any(False in votes))

    batches = prepared(recipe, batches)
    losses = accumulate(
        *(engine, loss_of, batches),
        all_finite=all_finite,
        check=check,
        said=said,
        term_norms=config.log_term_gradients,
    )
    factor = warmup_cosine(
        progress.step, warmup_steps=config.optim.warmup_steps, total_steps=config.steps
    )
    applied = engine.step(factor, recipe.locked_towers(progress))
    for part in recipe.parts.values():
        part.after_step(progress.step, applied=applied, learning_rate_factor=factor)
    return losses, applied
