"""What moves a run on: an episode's beginning, and a step. A stop inside of one undoes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.checkpoint.run_state import Place, undone_unless_done
from trainer.comm import stop_together
from trainer.config import RunConfig
from trainer.engine.accumulate import accumulate
from trainer.engine.products import fast_float32_products
from trainer.engine.schedule import learning_rate_factor
from trainer.engine.zero import Engine
from trainer.errors import ConfigError, DataError, NonFiniteLoss
from trainer.log.skipped_step import explain_skip, one_line
from trainer.pulse import PULSE
from trainer.recipe import NamesPhases, Recipe, prepared
from trainer.running.built import Run
from trainer.stop import Check, go_on
from trainer.types import Batch, Features, Losses, Progress


def with_phase(run: Run, progress: Progress) -> Place:
    name = run.recipe.phase_name if isinstance(run.recipe, NamesPhases) else "episode"
    with PULSE.phase(name), undone_unless_done(run.buffers):
        figures = run.recipe.begin_phase(progress, run.encode, run.stream)
    run.log.event(progress, name, **figures)
    return Place(progress, phase_begun=True)


def step_of(run: Run, progress: Progress) -> Progress:
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
        run.spikes.look(losses.total, progress)
    else:
        why = one_line(explain_skip(run.engine, batches, losses))
        run.log.event(progress, "skipped", why=why)
        try:
            run.skipped.one_more(why)
        except NonFiniteLoss as error:
            run.spikes.instead_of(error, progress)
            raise
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
    with fast_float32_products(engine.comm.device):
        losses = accumulate(
            *(engine, loss_of, batches),
            all_finite=all_finite,
            check=check,
            said=said,
            term_norms=config.log_term_gradients,
        )
    factor = learning_rate_factor(progress.step, config.optim, total_steps=config.steps)
    applied = engine.step(factor, recipe.locked_towers(progress))
    for part in recipe.parts.values():
        part.after_step(progress.step, applied=applied, learning_rate_factor=factor)
    return losses, applied
