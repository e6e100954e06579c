"""Norms of each tower against a plain loop on one process, whatever the ranks and the stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.test_zero import (
    batch_of,
    loss_of,
    new_engine,
    small_model,
)
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.engine.accumulate import accumulate
from trainer.engine.tower_norms import TOWERS

STAGES = ["zero0", "zero1", "zero3"]


def expected() -> dict[str, float]:
    """Of a gradient that nobody clips, and of the weights before a step at a rate of zero."""
    comm = Comm.solo()
    model = small_model(comm)
    [batch] = batch_of(0, comm, 1)
    loss_of(comm)(model(batch), batch).total.backward()
    sums: dict[str, float] = {}
    for name, value in model.named_parameters():
        tower, _ = model.parameter_depth(name)
        for kind, tensor in (("weight_norm", value), ("gradient_norm", value.grad)):
            assert tensor is not None
            key = f"{kind}/{tower}"
            sums[key] = sums.get(key, 0.0) + float(tensor.detach().double().square().sum())
    return {name: value**0.5 for name, value in sums.items()}


def norms_everywhere(comm: Comm, stages: list[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    found = []
    for stage in stages:
        engine = new_engine(comm, stage)
        said: dict[str, torch.Tensor] = {}
        accumulate(engine, loss_of(comm), batch_of(0, comm, 2), said=said)
        assert engine.step(0.0)
        norms = {name: float(value) for name, value in engine.tower_norms().items()}
        assert {"logit_scale", "prototype_scale"} <= said.keys()
        found.append((norms, engine.learning_rates()))
    return found


def test_norms_by_tower_are_those_of_a_plain_backward_pass() -> None:
    """Two ranks, two micro-batches each; gradients lie otherwise in each of these stages."""
    truth = expected()
    for norms, rates in run_ranks(norms_everywhere, 2, STAGES, timeout_seconds=400)[0]:
        for name, value in truth.items():
            assert norms[name] == pytest.approx(value, rel=2e-5), name
        assert rates == dict.fromkeys([f"learning_rate/{tower}" for tower in TOWERS], 0.0)
