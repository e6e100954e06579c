"""A run is ended at every place where it can be, by a real signal or an error, and goes on to the
same bytes; what was computed is saved before anything looks at it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.test_loop import STEPS, config_in, final_state, logged
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.cluster.progress import Interruptible
from trainer.comm import Comm
from trainer.config import RunConfig
from trainer.data.stream import Stream
from trainer.errors import ConfigError, DataError, TrainerError

TWO_EVALUATIONS = """evals=[
  {{name: zero_shot, label: names, data: "{data}", target: name, every: 4 steps}},
  {{name: retrieval, label: pairs, data: "{data}"}}]"""
# A rank takes 3 micro-batches a step, in 2 passes; an episode begins at step 3 (9 batches are
# extracted) and at step 6. The evaluation of step 4 comes between them.
PLACES = {
    "between micro-batches": ("step", 4 * 6 + 2, 4),
    "behind the clustering": ("step", 3 * 6 + 4, 3),
    "extraction": ("encode", 3, 3),
    "clustering": ("scored", 3, 3),
    "evaluation": ("encode", 10, 4),
}


def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    configs = {name: config_of(tmp_path, name) for name in ("whole", *PLACES, "alone", "dict")}
    first, second = run_ranks(all_of_it, 2, configs, timeout_seconds=600)
    assert first == second
    whole = final_state(configs["whole"])
    for name, (_, _, step) in PLACES.items():
        assert first[name] == [(step, False, 0), (STEPS, True, int(name == "evaluation"))], name
    # One rank could not read: both say so, and what was done before is saved.
    assert first["alone"] == ["rank 1: the disk is gone", (STEPS, True, 0)]
    assert first["dict"] == ["losses of recipe protoclip returned a dict"]
    for name in (*PLACES, "alone"):
        state = final_state(configs[name])
        assert state.keys() == whole.keys()
        assert [key for key in whole if not torch.equal(whole[key], state[key])] == [], name
        for file in ("metrics.jsonl", "events.jsonl"):
            assert logged(configs[name], file) == logged(configs["whole"], file), (name, file)


def config_of(folder: Path, name: str, *overrides: str) -> RunConfig:
    data = config_in(folder / name).data.train
    return config_in(folder / name, TWO_EVALUATIONS.format(data=data), *overrides)


def all_of_it(comm: Comm, configs: dict[str, RunConfig]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"whole": [trained(configs["whole"])]}
    for name, (what, number, _) in PLACES.items():
        with signal_at(what, number, here=comm.is_main):
            stopped = trained(configs[name])
        found[name] = [stopped, trained(configs[name])]
    with failing_stream(comm):
        said = trained(configs["alone"])
    assert last_saved(configs["alone"]) == 4
    found["alone"] = [said, trained(configs["alone"])]
    found["dict"] = [with_losses_as_a_dict(configs["dict"])]
    return found


def trained(config: RunConfig) -> tuple[int, bool, int] | str:
    from trainer.loop import train

    try:
        outcome = train(config)
    except TrainerError as error:
        return str(error)
    return outcome.progress.step, outcome.finished, outcome.evaluations_owed


def last_saved(config: RunConfig) -> int:
    restored = Checkpointer(config.workdir / "checkpoints", Comm.from_environment()).latest()
    assert restored is not None
    return restored.step


@contextmanager
def signal_at(what: str, number: int, *, here: bool) -> Iterator[None]:
    """A SIGTERM to this process when a run does something for the n-th time."""
    from trainer.engine.zero import Engine

    owner, method = {
        "step": (Engine, "__call__"),
        "encode": (Engine, "encode"),
        "scored": (Interruptible, "scored"),
    }[what]
    original, count = getattr(owner, method), 0

    def counting(self: Any, *arguments: Any) -> Any:
        nonlocal count
        count += what != "step" or self.module.training
        if here and count == number:
            count += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    setattr(owner, method, counting)
    try:
        yield
    finally:
        setattr(owner, method, original)


@contextmanager
def failing_stream(comm: Comm) -> Iterator[None]:
    """On rank 1 the second micro-batch of step 5 can't be read."""
    original, count = Stream.take_one, 0

    def failing(self: Stream) -> Any:
        nonlocal count
        count += 1
        if comm.rank == 1 and count == 4 * 3 + 2:
            raise DataError("the disk is gone")
        return original(self)

    Stream.take_one = failing
    try:
        yield
    finally:
        Stream.take_one = original


def with_losses_as_a_dict(config: RunConfig) -> str:
    from trainer.loop import train
    from trainer.recipes.protoclip import Recipe

    original = Recipe.losses
    Recipe.losses = lambda *arguments: dict(original(*arguments))
    try:
        with pytest.raises(ConfigError) as caught:
            train(config)
    finally:
        Recipe.losses = original
    return str(caught.value).split(";")[0]


# -- evaluations that fail --------------------------------------------------------------------


def damaged(spec: str) -> Path:
    """Flip a bit in a picture of a shard that the index has seen whole."""
    shard = Path(spec.replace("{000000..000001}", "000000"))
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    shard.write_bytes(data)
    return shard


def evaluate_and_mend(comm: Comm, config: RunConfig, good: Path, shard: Path) -> list[Any]:
    found = [trained(config)]
    comm.barrier()
    if comm.is_main:
        shutil.copy(good, shard)
    comm.barrier()
    return [*found, trained(config), trained(config)]


def test_an_evaluation_that_fails_costs_no_step_and_is_made_again(tmp_path: Path) -> None:
    """At step 4 it is an event, at the end an error after the save; mended, it is all that is
    left to do."""
    config = config_of(tmp_path, "run")
    shutil.copytree(tmp_path / "run" / "shards", tmp_path / "good")
    shutil.copytree(tmp_path / "run" / "shards", tmp_path / "bad")
    data = f"{tmp_path}/bad/{Path(config.data.train).name}"
    shard = damaged(data)
    config = config_in(tmp_path / "run", TWO_EVALUATIONS.format(data=data))
    good = tmp_path / "good" / shard.name
    first, second = run_ranks(evaluate_and_mend, 2, config, good, shard, timeout_seconds=300)
    assert first == second
    said, mended, nothing_left = first
    assert said.startswith("evaluation names failed: ")
    assert "; evaluation pairs failed: " in said
    assert said.endswith("; step 8 is saved, and the same command evaluates it again")
    assert mended == (STEPS, True, 2)
    assert nothing_left == (STEPS, True, 0)
    events = [(line["event"], line["step"]) for line in logged(config, "events.jsonl")]
    assert events == [
        *[("episode", 0), ("episode", 3), ("not evaluated", 4), ("episode", 6)],
        *[("names", 8), ("pairs", 8)],
    ]
