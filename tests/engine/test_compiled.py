"""Blocks by torch's compiler take the steps that they take without it, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.test_zero import batch_of, loss_of, small_model
from tests.ranks import run_ranks
from tests.virtual_gpu.cases import RECIPES, config_of, prepare
from trainer.comm import Comm
from trainer.engine.compiled import compile_blocks, refuse_compiled_blocks
from trainer.errors import ConfigError
from trainer.loop import train
from trainer.models.flops import TrainingFlops

CUT = {"tinyclip"}
"""A recipe whose model changes on the way."""


def losses_of(
    case: str, folder: Path, spec: str, comm: Comm, *, compiled: bool, checkpointing: bool
) -> list[float]:
    changes = (
        f"compile_blocks={str(compiled).lower()}",
        f"gradient_checkpointing={str(checkpointing).lower()}",
        f"workdir={folder}/{case}-{compiled}-{checkpointing}",
        "log_every=1 steps",
        "optim={learning_rate: 0.003}",
    )
    config = config_of(case, folder, spec, comm.world_size, *changes)
    assert train(config).finished
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    return [line["values"]["loss"] for line in map(json.loads, lines)]


def compiled_beside_plain(comm: Comm, folder: Path, spec: str, case: str) -> None:
    """The compiler's programs are counted: a run that fell back to none would be equal too."""
    counters = torch._dynamo.utils.counters
    for checkpointing in (False, True):
        plain = losses_of(case, folder, spec, comm, compiled=False, checkpointing=checkpointing)
        torch._dynamo.reset()
        counters.clear()
        found = losses_of(case, folder, spec, comm, compiled=True, checkpointing=checkpointing)
        assert len(found) == 4
        assert found == pytest.approx(plain, rel=1e-4), (case, checkpointing)
        assert counters["stats"]["unique_graphs"] > 0, (case, checkpointing)
        assert not counters["graph_break"], (case, checkpointing, counters["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(RECIPES.keys() - CUT))
def test_runs_of_every_recipe_take_the_same_steps(case: str, tmp_path: Path) -> None:
    spec = prepare(tmp_path)
    run_ranks(compiled_beside_plain, 1, tmp_path, spec, case, timeout_seconds=900)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_blocks_are_compiled_after_the_pass_that_is_counted() -> None:
    comm = Comm.solo()
    model = small_model(comm)
    names = list(model.state_dict())
    flops = TrainingFlops(model)
    assert compile_blocks(model) == 4
    blocks = [block for block in model.modules() if "forward" in vars(block)]
    assert not blocks
    (batch,) = batch_of(0, comm, 1)
    loss_of(comm)(model(batch), batch).total.backward()
    assert flops.per_micro_batch
    assert len([block for block in model.modules() if "forward" in vars(block)]) == 4
    assert list(model.state_dict()) == names


def test_compiled_blocks_are_refused_where_they_can_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_compiled_blocks(2, changes_shape=False)
    with pytest.raises(ConfigError, match="stages 0, 1 and 2"):
        refuse_compiled_blocks(3, changes_shape=False)
    with pytest.raises(ConfigError, match="can cut its model"):
        refuse_compiled_blocks(1, changes_shape=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        refuse_compiled_blocks(1, changes_shape=False)


def test_a_model_without_blocks_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="no transformer block"):
        compile_blocks(nn.Linear(2, 2))
