"""Every file of ds_configs/ trains, skips, saves and goes on at another number of ranks, in float32
and in bfloat16."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.engine.test_zero import CONFIGS, batch_of, loss_of, new_engine, reference
from tests.engine.test_zero import run_steps as take_steps
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.engine import zero
from trainer.engine.accumulate import accumulate


def cases() -> list[tuple[str, bool]]:
    """(file, in bfloat16) of every file, in both where it does not say which."""
    found = []
    for path in sorted(CONFIGS.glob("*.json")):
        forced = json.loads(path.read_text())["bf16"]["enabled"] is True
        found += [(path.stem, bf16) for bf16 in ((True,) if forced else (False, True))]
    return found


CASES = cases()
ON_A_GPU = [case for case in CASES if case[1] and case[0] != "zero3"]
"""What each file is there, once (zero3 is zero3_bf16 there)."""


def engine_of(comm: Comm, name: str, bf16: bool, weights: dict[str, Tensor] | None = None):
    """With the optimizer that a GPU gets: torch's fused one, of offloaded weights on the CPU."""
    if (name, bf16) not in ON_A_GPU:
        return new_engine(comm, name, weights, bf16=bf16)
    with patch.object(zero, "adamw", as_on_a_gpu):
        engine = new_engine(comm, name, weights, bf16=bf16)
    assert engine._optimizer.defaults["fused"]
    return engine


def as_on_a_gpu(*arguments: Any, adamw: Any = zero.adamw) -> torch.optim.Optimizer:
    with patch.object(torch.cuda, "is_available", lambda: True):
        return adamw(*arguments)


def train(comm: Comm, cases: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Two steps of two micro-batches, one with a NaN on the last rank, and one more step."""
    results = []
    for name, bf16 in cases:
        engine = engine_of(comm, name, bf16)
        take_steps(engine, comm, range(2), 2)
        saved = (engine.weights_share(), engine.moments_share())
        batches = batch_of(2, comm, 1)
        if comm.rank == comm.world_size - 1:
            batches[0].images[0, 0, 0, 0] = float("nan")
        accumulate(engine, loss_of(comm), batches)
        assert not engine.step(1.0), (name, bf16)
        after = engine.weights_share() | engine.moments_share()
        moved = [key for key, value in (saved[0] | saved[1]).items() if not value.equal(after[key])]
        take_steps(engine, comm, range(2, 3), 2)
        results.append({"saved": saved, "moved": moved, "end": engine.gathered_weights()})
    return results


def go_on(comm: Comm, cases: list[tuple[str, bool]], states: list[bytes]) -> list[dict[str, Any]]:
    results = []
    for (name, bf16), state in zip(cases, states, strict=True):
        weights, moments = (beneath(state, group) for group in ("weights", "moments"))
        engine = engine_of(comm, name, bf16, weights)
        engine.restore(weights, moments, 2, batch_of(0, comm, 1)[0])
        share = engine.weights_share() | engine.moments_share()
        changed = [key for key, value in share.items() if not value.equal((weights | moments)[key])]
        take_steps(engine, comm, range(2, 3), 2)
        results.append({"changed": changed, "end": engine.gathered_weights()})
    return results


def joined(ranks: list[list[dict[str, Any]]], index: int) -> bytes:
    """The shares of all ranks, as one file's bytes."""
    whole = dict[str, Tensor]()
    for rank in ranks:
        for group, share in zip(("weights", "moments"), rank[index]["saved"], strict=True):
            whole |= {f"{group}/{name}": value for name, value in share.items()}
    return save(whole)


def beneath(state: bytes, group: str) -> dict[str, Tensor]:
    prefix = f"{group}/"
    return {k.removeprefix(prefix): v for k, v in load(state).items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("cases", "before", "after"),
    [
        (ON_A_GPU, 2, 1),
        pytest.param(CASES, 1, 2, marks=pytest.mark.slow),
        pytest.param(CASES, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_every_file_trains_skips_saves_and_goes_on_elsewhere(
    cases: list[tuple[str, bool]], before: int, after: int
) -> None:
    expected, _ = reference(3)
    first = run_ranks(train, before, cases, timeout_seconds=400)
    states = [joined(first, index) for index in range(len(cases))]
    second = run_ranks(go_on, after, cases, states, timeout_seconds=400)
    for index, (name, bf16) in enumerate(cases):
        assert all(rank[index]["moved"] == [] for rank in first), (name, bf16)
        assert all(rank[index]["changed"] == [] for rank in second), (name, bf16)
        bounds = {"rtol": 0.1, "atol": 0.02} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
        for key, value in expected.items():
            torch.testing.assert_close(first[0][index]["end"][key], value, **bounds)
            torch.testing.assert_close(second[0][index]["end"][key], value, **bounds)
        if bf16:  # the float32 weights are saved, not what they are rounded to
            weights = beneath(states[index], "weights").values()
            assert any(not value.equal(value.bfloat16().float()) for value in weights)
