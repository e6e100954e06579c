"""Rows that learn a few at a time, beside torch.optim (invariant 19)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.parts import row_optimizer
from trainer.parts.row_optimizer import RowOptimizer, RowOptimizerConfig

COUNT, DIM, STEPS = 23, 5, 12
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "learning_rate": 0.05, "weight_decay": 0.3},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.3, "momentum": 0.8},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(row_optimizer, "CHUNK_NUMBERS", 4 * DIM)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A table, and for each step some rows in no order and their gradient. Row 0 is never there."""
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(COUNT, DIM, dtype=torch.float64, generator=generator).to(dtype)
    steps = []
    for _ in range(STEPS):
        places = torch.randperm(COUNT - 1, generator=generator)[:9] + 1
        gradient = torch.randn(9, DIM, dtype=torch.float64, generator=generator).to(dtype)
        steps.append((places, gradient))
    return table, steps


def factor(step: int) -> float:
    return 1.0 / (1 + step)


def peer(rows: Tensor, settings: dict[str, Any]) -> torch.optim.Optimizer:
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    if settings["optimizer"] == "sgd":
        momentum = settings["momentum"]
        return torch.optim.SGD([rows], lr=rate, weight_decay=decay, momentum=momentum)
    return torch.optim.AdamW([rows], lr=rate, weight_decay=decay, betas=(0.9, 0.98))


def peer_step(optimizer: torch.optim.Optimizer, rows: Tensor, gradient: Tensor, rate: float):
    optimizer.param_groups[0]["lr"] = rate
    rows.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dense_mode_is_torch_s_optimizer_on_gradients_filled_with_zeros(name, dtype):
    table, steps = problem(dtype)
    expected = table.clone().requires_grad_()
    optimizer = peer(expected, SETTINGS[name])
    ours = RowOptimizer(table.clone(), RowOptimizerConfig(**SETTINGS[name], dense=True))
    for step, (places, gradient) in enumerate(steps):
        dense = torch.zeros_like(table).index_copy(0, places, gradient)
        rate = SETTINGS[name]["learning_rate"] * factor(step)
        peer_step(optimizer, expected, dense, rate)
        ours.settle(places)
        ours.update(places, gradient.clone(), factor=factor(step))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours.rows, expected.detach(), rtol=tolerance, atol=tolerance)
    assert ours.steps.eq(STEPS).all()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dense", [False, True])
def test_all_rows_in_order_need_no_places(name, dense):
    table, _ = problem()
    config = RowOptimizerConfig(**SETTINGS[name], dense=dense)
    one, other = RowOptimizer(table.clone(), config), RowOptimizer(table.clone(), config)
    for step in range(3):
        gradient = torch.sin(table + step)
        one.settle(None)
        one.update(None, gradient.clone(), factor=1.0)
        other.settle(torch.arange(COUNT))
        other.update(torch.arange(COUNT), gradient.clone(), factor=1.0)
    torch.testing.assert_close(one.rows, other.rows, rtol=1e-14, atol=1e-14)
    assert not torch.equal(one.rows, table)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_row_lives_through_its_own_steps_alone(name):
    """Without decay: a row is what torch.optim makes of it in the steps that touch it."""
    settings = SETTINGS[name] | {"weight_decay": 0.0}
    table, steps = problem()
    ours = RowOptimizer(table.clone(), RowOptimizerConfig(**settings))
    for step, (places, gradient) in enumerate(steps):
        ours.settle(places)
        ours.update(places, gradient.clone(), factor=factor(step))
    for row in range(COUNT):
        alone = table[row].clone().requires_grad_()
        optimizer, count = peer(alone, settings), 0
        for step, (places, gradient) in enumerate(steps):
            for place in (places == row).nonzero().flatten().tolist():
                peer_step(
                    optimizer, alone, gradient[place], settings["learning_rate"] * factor(step)
                )
                count += 1
        torch.testing.assert_close(ours.rows[row], alone.detach(), rtol=1e-12, atol=1e-12)
        assert ours.steps[row] == count
    assert torch.equal(ours.rows[0], table[0])


@pytest.mark.parametrize("name", SETTINGS)
def test_untouched_rows_keep_weight_moments_and_count(name):
    table, steps = problem()
    ours = RowOptimizer(table.clone(), RowOptimizerConfig(**SETTINGS[name]))
    for places, gradient in steps:
        held = {"rows": ours.rows, "steps": ours.steps, **ours.moments}
        before = {key: value.clone() for key, value in held.items()}
        ours.settle(places)
        ours.update(places, gradient.clone(), factor=1.0)
        others = torch.ones(COUNT, dtype=torch.bool)
        others[places] = False
        assert all(torch.equal(before[key][others], held[key][others]) for key in held)
        assert all(not torch.equal(before[key][places], held[key][places]) for key in held)


def test_lazy_decay_pays_in_full():
    """Plain SGD with decay is the same whether rows decay at once or when they are needed."""
    settings = SETTINGS["sgd"] | {"momentum": 0.0}
    table, steps = problem()
    expected = table.clone().requires_grad_()
    optimizer = peer(expected, settings)
    ours = RowOptimizer(table.clone(), RowOptimizerConfig(**settings))
    for step, (places, gradient) in enumerate(steps):
        rate = settings["learning_rate"] * factor(step)
        ours.settle(places)
        torch.testing.assert_close(ours.rows[places], expected.detach()[places])
        dense = torch.zeros_like(table).index_copy(0, places, gradient)
        peer_step(optimizer, expected, dense, rate)
        ours.update(places, gradient.clone(), factor=factor(step))
    ours.settle(None)
    torch.testing.assert_close(ours.rows, expected.detach(), rtol=1e-12, atol=1e-12)
    again = ours.rows.clone()
    ours.settle(None)
    torch.testing.assert_close(ours.rows, again, rtol=1e-15, atol=0)


def test_lazy_decay_of_adamw_is_the_product_of_its_steps():
    table, steps = problem()
    settings = SETTINGS["adamw"]
    ours = RowOptimizer(table.clone(), RowOptimizerConfig(**settings))
    product = 1.0
    for step, (places, gradient) in enumerate(steps):
        ours.settle(places)
        ours.update(places, gradient.clone(), factor=factor(step))
        product *= 1 - settings["learning_rate"] * factor(step) * settings["weight_decay"]
    ours.settle(torch.tensor([0]))
    torch.testing.assert_close(ours.rows[0], table[0] * product, rtol=1e-12, atol=1e-12)


def test_the_order_of_the_touched_rows_does_not_matter():
    table, steps = problem()
    for settings in SETTINGS.values():
        for dense in (False, True):
            config = RowOptimizerConfig(**settings, dense=dense)
            one, other = RowOptimizer(table.clone(), config), RowOptimizer(table.clone(), config)
            for places, gradient in steps:
                one.update(places, gradient.clone(), factor=1.0)
                other.update(places.flip(0), gradient.flip(0), factor=1.0)
            torch.testing.assert_close(one.rows, other.rows, rtol=1e-14, atol=1e-14)


def test_a_decay_that_would_turn_rows_around_is_refused():
    with pytest.raises(ValueError, match="below 1"):
        RowOptimizerConfig(learning_rate=2.0, weight_decay=0.5)
