"""A run file: its keys, data, models, evaluations, and what its workdir holds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.lock import sole_user
from trainer.checkpoint.restored import Restored
from trainer.checkpoint.room import bytes_needed, check_room, free_bytes, size_in_words
from trainer.checkpoint.run_state import refuse_another_run, shards_of
from trainer.comm import Comm
from trainer.config import RunConfig, load_run, micro_batches, parse_run
from trainer.data.stream import Stream
from trainer.doctor.finding import Finding, looked_at
from trainer.doctor.scheduler import scheduler
from trainer.engine.zero_file import Decided, completed
from trainer.errors import CheckpointError, ConfigError, DataError, TrainerError
from trainer.evals.check import check_evaluations
from trainer.recipe import load_recipe
from trainer.run import (
    context_of,
    refuse_other_data,
    refuse_text_evals,
    stream_of,
    tokenizer_of,
)

CLOCK_SECONDS = 60.0


def run_file(path: str, overrides: Sequence[str], *, ranks: int) -> Iterator[Finding]:
    """What `ranks` ranks would meet; one rank here looks at everything."""
    try:
        config = load_run(path, overrides)
    except TrainerError as error:
        yield Finding("run file", str(error))
        return
    yield Finding("run file", said=path)
    comm = Comm.solo()
    yield looked_at("batch", lambda: _batch(config, ranks))
    yield looked_at("deepspeed", lambda: _deepspeed(config, comm))
    yield looked_at("tracker", lambda: _tracker(config))
    yield from scheduler(config)
    yield from _workdir(config, comm)
    free = free_bytes(config.workdir if config.workdir.exists() else config.workdir.parent)
    with tempfile.TemporaryDirectory() as folder:  # nothing is left in the workdir
        yield from _data(config.model_copy(update={"workdir": Path(folder)}), comm, free)
    yield looked_at("evaluations", lambda: _evaluations(config, comm))


def _batch(config: RunConfig, ranks: int) -> str:
    micro, times = micro_batches(
        global_batch=config.global_batch, micro_batch=config.micro_batch, world_size=ranks
    )
    return f"{config.global_batch} = {ranks} ranks x {micro} x {times}"


def _deepspeed(config: RunConfig, comm: Comm) -> str:
    micro, times = micro_batches(
        global_batch=config.global_batch, micro_batch=config.micro_batch, world_size=1
    )
    stage = completed(config.deepspeed, comm, Decided(micro, times, config.optim))
    return f"{config.deepspeed}, stage {stage['zero_optimization']['stage']}"


def _tracker(config: RunConfig) -> str:
    """Without a run on its server: only whether there is the package."""
    if config.wandb is not None and find_spec("wandb") is None:
        raise ConfigError(f"wandb: {config.wandb} needs it: pip install wandb, or drop the key")
    return config.wandb or "none asked for"


def _evaluations(config: RunConfig, comm: Comm) -> str:
    refuse_text_evals(config)
    check_evaluations(config.evals, comm, dim=config.recipe.model.embed_dim)
    return ", ".join(entry.label for entry in config.evals) or "none"


def _data(config: RunConfig, comm: Comm, free: int) -> Iterator[Finding]:
    """Shards, captions and pictures of a first batch, the model and its frozen folders."""
    try:
        tokenizer = tokenizer_of(config, comm)
    except (TrainerError, OSError) as error:
        yield Finding("shards" if isinstance(error, DataError) else "tokenizer", str(error))
        return
    yield Finding("tokenizer", said="none needed" if tokenizer is None else "reads")
    micro = min(config.global_batch, 16)
    try:
        stream = stream_of(config, comm, tokenizer, micro_batch=config.micro_batch or micro)
    except (TrainerError, OSError) as error:
        yield Finding("shards", str(error))
        return
    with closing(stream):
        said = f"{len(stream.shard_lines)} with {stream.epoch_size} samples an epoch"
        yield Finding("shards", said=said)
        yield looked_at("vectors and labels", lambda: refuse_other_data(config, stream.shard_lines))
        yield looked_at("samples", lambda: _samples(stream))
        yield from _model(config, comm, tokenizer, free)


def _samples(stream: Stream) -> str:
    began = time.perf_counter()
    count = sum(len(stream.take_one().sample_id) for _ in range(2))
    return f"{count / (time.perf_counter() - began):.0f} a second, with data.workers as given"


def _model(
    config: RunConfig, comm: Comm, tokenizer: PreTrainedTokenizerFast | None, free: int
) -> Iterator[Finding]:
    """The model as a run makes it, and room for what a run saves of it."""
    try:
        with torch.random.fork_rng(devices=[]):
            recipe = load_recipe(config.recipe, context_of(config, comm, tokenizer))
    except (TrainerError, OSError) as error:
        yield Finding("model", str(error))
        return
    trained = recipe.model.count_parameters()["trained"]
    yield Finding("model", said=f"{trained:,} trained parameters")
    needed = bytes_needed(None, trained, averaged=config.average is not None)
    kept = config.keep_checkpoints + 1  # the newest is written before the oldest goes
    wrong = (
        f"{kept} checkpoints of {size_in_words(needed)} (keep_checkpoints, and one that is being "
        f"written), and {size_in_words(free)} free for the workdir; make room"
    )
    yield Finding("disk", wrong if free < kept * needed else "", size_in_words(free))


def _workdir(config: RunConfig, comm: Comm) -> Iterator[Finding]:
    fresh = not config.workdir.exists()
    yield looked_at("workdir", lambda: _usable(config, comm))
    yield looked_at("clock", lambda: _clock(config.workdir))
    if fresh:
        with suppress(OSError):
            (config.workdir / "lock").unlink(missing_ok=True)
            (config.workdir / "checkpoints").rmdir()
            config.workdir.rmdir()
        yield Finding("checkpoints", said="none yet")
        return
    refused: list[str] = []
    try:
        restored = Checkpointer(config.workdir / "checkpoints", comm).latest(warn=refused.append)
        wrong = "; ".join(refused)
    except CheckpointError as error:
        restored, wrong = None, str(error)
    if wrong and restored is not None:
        wrong += f"; a run would go on from step {restored.step}"
    said = "none yet" if restored is None else f"goes on from step {restored.step}"
    yield Finding("checkpoints", wrong, said)
    if restored is not None:
        yield looked_at("the same run", lambda: _same_run(restored, config))


def _usable(config: RunConfig, comm: Comm) -> str:
    with sole_user(config.workdir, comm):
        check_room(config.workdir / "checkpoints", comm, needed=1 << 20)
    return str(config.workdir)


def _same_run(restored: Restored, config: RunConfig) -> None:
    old = parse_run(restored.texts["run.yaml"], source="run.yaml")
    refuse_another_run(old, config, restored, same_shards=shards_of(restored) is not None)


def _clock(folder: Path) -> str:
    """Periods in minutes and other hosts' files are of no use where clocks are far apart."""
    probe = folder / f".clock-{os.getpid()}"
    try:
        probe.touch()
        away = probe.stat().st_mtime - time.time()
        probe.unlink()
    except OSError:
        return "not known"
    if abs(away) > CLOCK_SECONDS:
        raise ConfigError(
            f"the disk of {folder} is {away:+.0f} s away from this host's clock; set both by ntp"
        )
    return "agrees with the disk's"
