"""Seconds per phase of a ProtoCLIP episode, and how they grow with its size and with K.

The real recipe on real shards, one rank, in this process: extract (read, decode, augment and
encode), cluster, translate (prototypes, targets, labels) and train (the steps of the episode).
"""

from __future__ import annotations

import math
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trainer.bench.launch import ROOT
from trainer.bench.options import SHARDS, add_model_options, model_of, number_list
from trainer.comm import Comm
from trainer.config import DataConfig, PositiveInt, RunConfig
from trainer.data.stream import Stream
from trainer.engine.zero import Engine
from trainer.models.two_tower import TwoTowerConfig
from trainer.recipe import Recipe, load_recipe
from trainer.recipes import protoclip
from trainer.run import context_of, stream_of, tokenizer_of
from trainer.running.steps import train_step
from trainer.types import Progress

PHASES = ("extract", "cluster", "translate", "train")


class EpisodeCase(protoclip.Config):
    """The recipe's own keys, one episode size and one K, and what training needs besides."""

    model: TwoTowerConfig = TwoTowerConfig(preset="tiny", text_length=16)
    warmup_episodes: int = 0
    global_batch: PositiveInt = 64
    timed_steps: PositiveInt = 5
    """Steps that are timed after a first one; their median stands for all of the episode."""
    rounds: PositiveInt = 2
    """Episodes of each size; the fastest of each phase counts."""


def add_options(command: ArgumentParser) -> None:
    add_model_options(command)
    command.add_argument("--data", default=SHARDS, help="shards")
    command.add_argument("--samples", type=number_list, default=(512, 1024, 2048), help="sizes")
    command.add_argument("--clusters", type=number_list, default=(64, 128, 256), help="K")
    command.add_argument("--steps", type=int, default=5, help="timed steps of each episode")
    command.add_argument("--rounds", type=int, default=2, help="episodes of each size")


def measure_options(options: Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(options.threads)
    case = EpisodeCase(
        model=model_of(options),
        global_batch=options.batch,
        timed_steps=options.steps,
        rounds=options.rounds,
    )
    return run(options.data, samples=options.samples, clusters=options.clusters, case=case)


def run(
    shards: str,
    *,
    samples: Sequence[int] = (512, 1024, 2048),
    clusters: Sequence[int] = (64, 128, 256),
    case: EpisodeCase | None = None,
) -> list[dict[str, Any]]:
    """One row per episode: every size with the least K, then the largest size with every other K.

    Seconds of each phase, and its growth: the exponent g of seconds ~ size^g (or K^g) between
    this row and the one it follows. A g near 1 means that twice as much takes twice as long.
    """
    start = case or EpisodeCase()
    least, *counts = sorted(clusters)
    cases = [(size, least) for size in sorted(samples)]
    cases += [(max(samples), count) for count in counts]
    # What is only done once in a process must not be part of the first row.
    measure(shards, _with(start, cases[0]))
    fastest: dict[tuple[int, int], dict[str, Any]] = {}
    for _ in range(start.rounds):
        for sizes in cases:
            row = measure(shards, _with(start, sizes))
            fastest[sizes] = _fastest(row, fastest.get(sizes, row))
    rows = list(fastest.values())
    return [row | _growth(row, before) for row, before in zip(rows, [None, *rows], strict=False)]


def _fastest(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return one | {name: min(one[name], other[name]) for name in map(_seconds, PHASES)}


def _seconds(phase: str) -> str:
    return f"{phase}_seconds"


def _with(case: EpisodeCase, sizes: tuple[int, int]) -> EpisodeCase:
    return case.model_copy(update={"episode_samples": sizes[0], "clusters": sizes[1]})


def measure(shards: str, case: EpisodeCase) -> dict[str, Any]:
    """One episode from its start."""
    comm = Comm.from_environment()
    with tempfile.TemporaryDirectory() as folder:
        config = _run_config(shards, case, Path(folder))
        stream, recipe, engine = _begin(config, comm)
        with closing(stream):
            figures = recipe.begin_phase(Progress(), engine.encode, stream)
            laps = [_lap(engine, recipe, stream, config) for _ in range(1 + case.timed_steps)]
    steps = -(-case.episode_samples // case.global_batch)
    seconds = {"train": median(laps[1:]) * steps}
    for phase in PHASES[:-1]:
        seconds[phase] = figures[f"seconds_{phase}"]
    return {
        "bench": "episode",
        "preset": case.model.preset,
        "global_batch": case.global_batch,
        "threads": torch.get_num_threads(),
        "device": comm.device.type,
        "timed_steps": case.timed_steps,
        "samples": steps * case.global_batch,
        "clusters": case.clusters,
        **{_seconds(phase): seconds[phase] for phase in PHASES},
    }


def _begin(config: RunConfig, comm: Comm) -> tuple[Stream, Recipe, Engine]:
    tokenizer = tokenizer_of(config, comm)
    recipe = load_recipe(config.recipe, context_of(config, comm, tokenizer))
    batch = config.global_batch
    stream = stream_of(config, comm, tokenizer, micro_batch=batch)
    engine = Engine(
        recipe.model, config.optim, comm, deepspeed_config=config.deepspeed, micro_batch=batch
    )
    return stream, recipe, engine


def _lap(engine: Engine, recipe: Recipe, stream: Stream, config: RunConfig) -> float:
    """Seconds of one training step, the wait for its data included."""
    began = time.perf_counter()
    train_step(engine, recipe, stream.take(), Progress(), config)
    return time.perf_counter() - began


def _growth(row: dict[str, Any], before: dict[str, Any] | None) -> dict[str, float | None]:
    """The exponent of each phase against what changed since the row before."""
    if before is None:
        return {f"{phase}_growth": None for phase in PHASES}
    changed = "samples" if row["samples"] != before["samples"] else "clusters"
    factor = math.log(row[changed] / before[changed])
    growth: dict[str, float | None] = {}
    for phase in PHASES:
        now, then = (each[_seconds(phase)] for each in (row, before))
        known = now > 0 and then > 0 and factor > 0
        growth[f"{phase}_growth"] = round(math.log(now / then) / factor, 2) if known else None
    return growth


def _run_config(shards: str, case: EpisodeCase, folder: Path) -> RunConfig:
    return RunConfig(
        workdir=folder,
        steps=10**9,
        global_batch=case.global_batch,
        deepspeed=ROOT / "ds_configs" / "zero0.json",
        recipe=case,
        data=DataConfig(train=shards),
    )
