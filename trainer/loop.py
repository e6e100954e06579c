"""Build everything from one configuration, then train. This page is the whole program."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.lock import sole_user
from trainer.checkpoint.run_state import frozen_digest, load_rest, load_weights, save_state
from trainer.comm import Comm
from trainer.config import RunConfig, micro_batches
from trainer.engine.accumulate import accumulate
from trainer.engine.schedule import warmup_cosine
from trainer.engine.zero import Engine
from trainer.errors import CheckpointError
from trainer.evals import evaluate_all
from trainer.log.metrics import MetricLog
from trainer.log.opening_lines import describe
from trainer.log.skipped_step import explain_skip, one_line, raise_if_stuck
from trainer.periods import Clock
from trainer.pictures.run import training_pictures
from trainer.recipe import Recipe, load_recipe
from trainer.run import context_of, eval_context, refuse_text_evals, stream_of, tokenizer_of
from trainer.stop import StopRequest
from trainer.types import Batch, Features, Losses, Progress


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    progress: Progress
    finished: bool
    """False: stopped by a signal; the same command goes on from here."""
    steps_now: int
    """Steps taken by this call."""


def train(config: RunConfig) -> Outcome:
    """Train to `config.steps`, going on from the newest good checkpoint in the workdir."""
    comm = Comm.from_environment(timeout_seconds=config.comm_timeout_seconds)
    with sole_user(config.workdir, comm):
        return _train(config, comm)


def _train(config: RunConfig, comm: Comm) -> Outcome:
    micro_batch, _ = micro_batches(
        global_batch=config.global_batch, micro_batch=config.micro_batch, world_size=comm.world_size
    )
    checkpoints = Checkpointer(config.workdir / "checkpoints", comm, keep=config.keep_checkpoints)
    restored = checkpoints.latest()
    if restored and restored.step >= config.steps:
        return Outcome(Progress(**restored.state["progress"]), finished=True, steps_now=0)
    refuse_text_evals(config)
    tokenizer = tokenizer_of(config, comm)
    stream = stream_of(config, comm, tokenizer, micro_batch=micro_batch)
    recipe = load_recipe(config.recipe, context_of(config, comm, tokenizer))
    recipe.model.gradient_checkpointing(config.gradient_checkpointing)
    parameters, frozen = recipe.model.count_parameters(), frozen_digest(recipe.model)
    if restored:
        load_weights(restored, recipe.model, config, frozen=frozen)
    engine = Engine(
        recipe.model,
        config.optim,
        comm,
        deepspeed_config=config.deepspeed,
        micro_batch=micro_batch,
    )
    progress = load_rest(restored, engine, recipe, stream.take()[0]) if restored else Progress()
    stream.seek(progress.samples)
    start, in_a_row, interrupted = progress.step, 0, False
    clock = Clock(comm, epoch_size=stream.epoch_size)
    log = MetricLog(
        config.workdir,
        comm,
        total_steps=config.steps,
        log_every=config.log_every,
        epoch_size=stream.epoch_size,
    )
    with log, StopRequest() as stop, closing(stream):
        log.resume(progress)
        log.say(describe(config, parameters, stream, world_size=comm.world_size))
        if restored:
            log.say(f"going on from step {start} in {restored.folder}")

        while progress.step < config.steps and not interrupted:
            if recipe.phase_due(progress):
                figures = recipe.begin_phase(progress, engine.encode, stream)
                log.event(progress, "episode", **figures)
            before, batches = progress, stream.take()
            losses, applied = train_step(engine, recipe, batches, progress, config)
            progress = progress.advance(samples=config.global_batch, applied=applied)
            in_a_row = 0 if applied else in_a_row + 1
            if not applied:
                found = explain_skip(engine, batches, losses)
                log.event(progress, "skipped", why=one_line(found))
                raise_if_stuck(in_a_row, limit=config.max_skipped_steps, why=one_line(found))
            numbers = {"loss": losses.total, **losses, "gradient_norm": engine.gradient_norm}
            log.put(progress, numbers, wait_seconds=stream.wait_seconds)

            ends = progress.step == config.steps
            due = [e for e in config.evals if ends or clock.due(e.label, e.every, before, progress)]
            context = eval_context(config, comm, tokenizer)
            for label, figures in evaluate_all(due, engine.encode, context).items():
                log.event(progress, label, **figures)
            for name, picture in training_pictures(
                recipe, config, due, engine.encode, context
            ).items():
                log.image(progress, name, picture)
            interrupted = stop.agreed(comm)
            if ends or interrupted or clock.due("save", config.save_every, before, progress):
                log.flush()
                try:
                    save_state(checkpoints, engine, recipe, progress, config, frozen=frozen)
                except CheckpointError as error:
                    if ends or interrupted:
                        raise
                    log.event(progress, "not saved", why=str(error))
    return Outcome(
        progress, finished=progress.step == config.steps, steps_now=progress.step - start
    )


def train_step(
    engine: Engine,
    recipe: Recipe,
    batches: Sequence[Batch],
    progress: Progress,
    config: RunConfig,
) -> tuple[Losses, bool]:
    """Take one optimizer step over this rank's micro-batches.

    Every loss is a mean over this rank's samples; ZeRO averages gradients over ranks and each
    Part divides its own. Returns the losses and whether the step was applied: it is not, on any
    rank and in any Part, if a gradient on some rank was not finite.
    """

    def loss_of(features: Features, batch: Batch) -> Losses:
        return recipe.losses(features, batch, progress.step)

    def all_finite() -> bool:
        votes = [part.gradients_finite() for part in recipe.parts.values()]
        asked = any(vote is not None for vote in votes)
        return not (asked and engine.comm.any(False in votes))

    losses = accumulate(engine, loss_of, batches, all_finite=all_finite)
    factor = warmup_cosine(
        progress.step, warmup_steps=config.optim.warmup_steps, total_steps=config.steps
    )
    applied = engine.step(factor, recipe.locked_towers(progress))
    for part in recipe.parts.values():
        part.after_step(progress.step, applied=applied, learning_rate_factor=factor)
    return losses, applied
