"""What the evaluations of a run need, looked at before its first step.

A mistake in a path or a key that shows after the last step comes hours too late. So every shard
and store is opened on every rank, and the main rank reads samples until each thing that an
evaluation asks of them was found once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from trainer.comm import Comm, agreed
from trainer.config import EvalConfig
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.evals.context import Wanted
from trainer.evals.evaluate import refuse_equal_labels
from trainer.evals.samples import Record, select, values_of
from trainer.hashing import key_of, permutation
from trainer.store import EmbeddingStore

EVENTS_OF_A_RUN = frozenset(
    {"episode", "stage", "skipped", "not saved", "not evaluated", "not drawn"}
)
MOST_LOOKED_AT = 10_000
"""Samples, in the order of a hash, that are read in search of a key before it counts as missing."""


def check_evaluations(configs: Sequence[EvalConfig], comm: Comm, *, dim: int) -> None:
    """DataError on all ranks, before anything is computed, where an evaluation can't work.

    `dim` is the width of the model's features. Names every evaluation that has a mistake, and its
    first one.
    """
    refuse_equal_labels(configs)
    _refuse_taken_labels(configs)
    agreed(comm, lambda: _raise(_each(configs, lambda config: _open(config, dim))))
    found = _each(configs, _search) if comm.is_main else []
    _raise(comm.broadcast_json(found))


def stores_of(config: EvalConfig) -> list[Path]:
    """The stores of texts that an evaluation names; none where a language has still to be found."""
    if config.text_store is None:
        return []
    if "{}" not in str(config.text_store):
        return [config.text_store]
    return [Path(str(config.text_store).replace("{}", each)) for each in config.languages or ()]


def _refuse_taken_labels(configs: Sequence[EvalConfig]) -> None:
    for config in configs:
        if config.label in EVENTS_OF_A_RUN:
            raise ConfigError(
                f"an evaluation is labelled {config.label!r}, as an event of every run is; choose "
                "another label"
            )


def _wanted(config: EvalConfig) -> Sequence[Wanted]:
    wanted: Sequence[Wanted] = importlib.import_module(f"trainer.evals.{config.name}").wanted(
        config
    )
    return wanted


def _open(config: EvalConfig, dim: int) -> None:
    for path in stores_of(config):
        store = EmbeddingStore.open(path)
        if store.dim != dim:
            raise ConfigError(f"{path} holds vectors of {store.dim} numbers, the model gives {dim}")
    for spec in dict.fromkeys(each.spec for each in _wanted(config)):
        if not len(ShardSet.open(spec)):
            raise DataError(f"no sample in {spec}; an evaluation needs at least one")


def _search(config: EvalConfig) -> None:
    wanted = _wanted(config)
    for spec in dict.fromkeys(each.spec for each in wanted):
        open_wishes = [each for each in wanted if each.spec == spec]
        count, first = 0, None
        for record in _some_records(spec, config.limit):
            count, first = count + 1, first or record
            open_wishes = [each for each in open_wishes if not each.found(record)]
            if not open_wishes:
                break
        if first is None:
            raise DataError(f"none of the samples of {spec} that were looked at can be read")
        if open_wishes:
            raise DataError(
                f"none of {count} samples of {spec} has {open_wishes[0].what}; they have "
                + ", ".join(sorted(first.values))
            )


def _some_records(spec: str, limit: int | None) -> Iterator[Record]:
    """What samples say that the evaluation will read, from all over the shards."""
    shards = ShardSet.open(spec)
    chosen = select(torch.as_tensor(shards.ids), limit)
    order = permutation(len(chosen), key_of("evaluation check"))[:MOST_LOOKED_AT]
    for index in chosen[order].tolist():
        try:
            raw = shards.read(index)
            yield Record(raw.sample_id, values_of(raw.fields))
        except (BadSample, DamagedSample):
            continue


def _each(configs: Sequence[EvalConfig], action: Callable[[EvalConfig], None]) -> list[str]:
    """The first mistake of each evaluation that has one."""
    mistakes = []
    for config in configs:
        try:
            action(config)
        except (TrainerError, OSError) as error:
            mistakes.append(_labelled(config, str(error)))
    return mistakes


def _labelled(config: EvalConfig, mistake: str) -> str:
    start = f"evaluation {config.label}: "
    return mistake if mistake.startswith(start) else start + mistake


def _raise(mistakes: Sequence[str]) -> None:
    if mistakes:
        raise DataError("; ".join(mistakes))
