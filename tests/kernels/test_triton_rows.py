"""The kernel that moves rows, by Triton's interpreter, and how few launches a step of it takes."""

from __future__ import annotations

from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.interpreter import rows_of
from tests.launches import launches_of
from trainer.parts import row_optimizer
from trainer.parts.half_rows import HalfRowOptimizer
from trainer.parts.row_optimizer import RowOptimizer, RowOptimizerConfig

pytest.importorskip("triton", reason="Triton's wheel is for Linux")


def eight_rows(program: str) -> list[dict[str, Any]]:
    rows = rows_of(program)
    assert len(rows) == 8
    return rows


def test_rows_move_as_one_operation_after_another_moves_them_to_the_last_bit() -> None:
    """Drawn rows that owe decay, and all; widths that are no power of two, or of several tiles."""
    for row in eight_rows("tests.kernels.interpreted_rows"):
        assert row["moved"], row
        assert row["bits"] == [], row
        assert row["difference"] < 1e-6, row


def test_rows_in_bfloat16_move_and_are_rounded_as_torch_does_it_to_the_last_bit() -> None:
    for row in eight_rows("tests.kernels.interpreted_half_rows"):
        assert row["moved"], row
        assert row["bits"] == [], row


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_launches_of_a_step_do_not_grow_with_the_rows(optimizer: str) -> None:
    """Settling and moving; at most 24, and no reading of a result by the host."""
    counts = [launches(count, dim, optimizer) for count, dim in SIZES]
    assert len(set(counts)) == 1, counts
    assert counts[0] <= 24


SIZES = ((100, 64), (20_500, 512), (125_000, 512), (156_250, 768))


def launches(count: int, dim: int, optimizer: str) -> int:
    """Of a step on half of the rows as a GPU takes it, on tensors without numbers."""
    with (
        FakeTensorMode(),
        patch("trainer.kernels.triton_rows.adamw_of_rows", {(count,): lambda *_, **__: None}),
        patch.object(row_optimizer, "CHUNK_NUMBERS", row_optimizer.DEVICE_NUMBERS),
        patch.object(RowOptimizer, "_by_kernel", PropertyMock(return_value=optimizer == "adamw")),
    ):
        table = torch.empty(2 * count, dim)
        held = RowOptimizer(table, RowOptimizerConfig(optimizer=optimizer))
        places = torch.empty(count, dtype=torch.int64)
        gradient = torch.empty(count, dim)

        def step() -> None:
            held.log_decay = -0.1
            held.settle(places)
            held.update(places, gradient, factor=1.0)

        return launches_of(step)


def test_launches_of_rows_in_bfloat16_do_not_grow_either() -> None:
    """Taking and moving: 60 of them are the hash of a row's number, in 64 bits."""
    counts = [half_launches(count, dim) for count, dim in SIZES]
    assert len(set(counts)) == 1, counts
    assert counts[0] <= 100


def half_launches(count: int, dim: int) -> int:
    """As `launches`."""
    name = "trainer.kernels.triton_half_rows.adamw_of_half_rows"
    with (
        FakeTensorMode(),
        patch(name, {(count,): lambda *_, **__: None}),
        patch.object(HalfRowOptimizer, "_by_kernel", PropertyMock(return_value=True)),
    ):
        table = torch.empty(2 * count, dim)
        held = HalfRowOptimizer(table, RowOptimizerConfig(rows="bfloat16"))
        places = torch.empty(count, dtype=torch.int64)
        gradient = torch.empty(count, dim)

        def step() -> None:
            held.taken(places)
            held.update(places, gradient, factor=1.0)

        return launches_of(step)
