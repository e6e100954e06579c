"""Everything that a run needs, made of one configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.checkpoint.beside import SavesBeside
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.restored import Restored
from trainer.checkpoint.room import bytes_needed, check_room
from trainer.checkpoint.run_state import (
    Place,
    changed_settings,
    frozen_digest,
    load_rest,
    load_weights,
    place_of,
    shards_of,
)
from trainer.comm import Comm, agreed, refuse_differing
from trainer.config import RunConfig, Weights, micro_batches
from trainer.data.stream import Stream
from trainer.engine.compiled import compile_blocks, refuse_compiled_blocks
from trainer.engine.zero import Engine, persistent_buffers
from trainer.engine.zero_file import Decided, completed
from trainer.evals.check import check_evaluations
from trainer.log.environment import write_start
from trainer.log.meter import Meter
from trainer.log.metrics import MetricLog
from trainer.log.opening_lines import describe
from trainer.log.skipped_step import SkippedSteps
from trainer.log.tracker import WeightsAndBiases, tracker_for
from trainer.long_work import tell
from trainer.models.stored import towers_as_stored
from trainer.parts.averaged_weights import AveragedWeights
from trainer.periods import Clock
from trainer.pulse import PULSE
from trainer.recipe import ChangesShape, Context, Recipe, attach_parts, load_recipe
from trainer.run import (
    add_average,
    context_of,
    loading_notes,
    refuse_other_data,
    refuse_text_evals,
    stream_of,
    tokenizer_of,
)
from trainer.running.spikes import LeftOut, Spikes
from trainer.stop import Check
from trainer.types import Batch, Features, Progress


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
    checkpoints: SavesBeside
    log: MetricLog
    meter: Meter
    clock: Clock
    skipped: SkippedSteps
    spikes: Spikes

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


def built(
    config: RunConfig,
    comm: Comm,
    checkpoints: Checkpointer,
    restored: Restored | None,
    check: Check,
    left_out: Sequence[LeftOut] = (),
) -> Run:
    """Everything that a run needs, as it was at the checkpoint; mistakes are told on the way."""
    shares = micro_batches(
        global_batch=config.global_batch, micro_batch=config.micro_batch, world_size=comm.world_size
    )
    decided = Decided(*shares, config.optim)
    tracker = _checked(config, comm, decided)
    tokenizer, stream = _opened(config, comm, restored, decided)
    shape = restored.state.get("shape") if restored else None
    context = context_of(config, comm, tokenizer, check, shape)
    stage = completed(config.deepspeed, comm, decided)["zero_optimization"]["stage"]
    recipe = _loaded(config, context, stage)
    parameters, frozen = recipe.model.count_parameters(), frozen_digest(recipe.model)
    averaged = config.average is not None
    needed = bytes_needed(restored, parameters["trained"], averaged=averaged)
    check_room(config.workdir / "checkpoints", comm, needed=needed)
    if restored:
        PULSE.mark()
        tell(f"reading {restored.folder}")
        load_weights(restored, recipe.model, config, frozen=frozen)
    engine = _engine(config, comm, recipe, decided)
    average = add_average(recipe, config)
    attach_parts(recipe, engine)
    start = Place(Progress())
    if restored:
        load_rest(restored, engine, recipe, stream.take_one())
        start = place_of(restored)
    stream.seek(start.progress.samples)
    write_start(config, comm, step=start.progress.step)
    samples, peak = decided.micro_batch, config.device_peak_tflops
    meter = Meter(comm, samples_per_micro_batch=samples, peak_tflops=peak)
    log = _log(config, comm, stream, meter, tracker)
    log.resume(start.progress, phase_begun=start.phase_begun)
    notes = loading_notes(config, recipe)
    size = comm.world_size
    log.say(describe(config, parameters, stream, world_size=size, stage=stage, notes=notes))
    spikes = Spikes(config, comm, left_out, restored)
    spikes.tell(log, start.progress)
    if restored:
        log.say(f"going on from step {restored.step} in {restored.folder}")
        if changes := changed_settings(restored, config):
            log.event(start.progress, "settings changed", **changes)
    return Run(
        *(config, comm, check, tokenizer, stream, recipe, frozen, engine, average),
        checkpoints=SavesBeside(checkpoints, waits=not config.save_beside),
        log=log,
        meter=meter,
        clock=Clock(comm, epoch_size=stream.epoch_size),
        skipped=SkippedSteps(limit=config.max_skipped_steps),
        spikes=spikes,
    )


def _checked(config: RunConfig, comm: Comm, decided: Decided) -> WeightsAndBiases | None:
    """What can be told before anything large is opened; and who else takes the numbers."""
    PULSE.mark()  # here and below: who hangs before one is behind those who wait after it
    agreed(comm, lambda: completed(config.deepspeed, comm, decided))
    agreed(comm, lambda: refuse_text_evals(config))
    tracker = agreed(comm, lambda: tracker_for(config, comm))
    if config.evals:
        tell(f"looking into the data of {len(config.evals)} evaluations")
    check_evaluations(config.evals, comm, dim=config.recipe.model.embed_dim)
    return tracker


def _opened(
    config: RunConfig, comm: Comm, restored: Restored | None, decided: Decided
) -> tuple[PreTrainedTokenizerFast | None, Stream]:
    PULSE.mark()
    tell(f"opening {config.data.train}")
    tokenizer = tokenizer_of(config, comm)
    size, before = decided.micro_batch, shards_of(restored)
    stream = agreed(
        comm, lambda: stream_of(config, comm, tokenizer, micro_batch=size, before=before)
    )
    refuse_differing(comm, stream.shard_lines, what="the shards of data.train")
    agreed(comm, lambda: refuse_other_data(config, stream.shard_lines))
    return tokenizer, stream


def _loaded(config: RunConfig, context: Context, stage: int) -> Recipe:
    tell(f"building the model of {config.recipe.name}")
    with PULSE.phase("building the model"), towers_as_stored(stage == 3):
        recipe = load_recipe(config.recipe, context)
    recipe.model.gradient_checkpointing(config.gradient_checkpointing)
    if config.compile_blocks:
        refuse_compiled_blocks(stage, changes_shape=isinstance(recipe, ChangesShape))
        compile_blocks(recipe.model)
    return recipe


def _engine(config: RunConfig, comm: Comm, recipe: Recipe, decided: Decided) -> Engine:
    PULSE.mark()
    return Engine(
        *(recipe.model, config.optim, comm),
        deepspeed_config=config.deepspeed,
        micro_batch=decided.micro_batch,
        accumulation=decided.accumulation,
    )


def _log(
    config: RunConfig, comm: Comm, stream: Stream, meter: Meter, tracker: WeightsAndBiases | None
) -> MetricLog:
    return MetricLog(
        *(config.workdir, comm),
        total_steps=config.steps,
        log_every=config.log_every,
        epoch_size=stream.epoch_size,
        meter=meter,
        tracker=tracker,
    )
