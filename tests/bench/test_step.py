"""The step benchmark compares like with like: same losses, right shares, a peak that is a peak."""

from __future__ import annotations

import pytest
import torch

from trainer.bench.memory import peak_bytes
from trainer.bench.step import StepCase, run
from trainer.bench.table import format_rows
from trainer.errors import ConfigError
from trainer.models.two_tower import TowerConfig, TwoTowerConfig

TOWER = TowerConfig(width=32, layers=3, heads=2)
CASE = StepCase(
    model=TwoTowerConfig(
        image_size=32,
        patch_size=8,
        text_length=8,
        vocabulary=300,
        embed_dim=16,
        image=TOWER,
        text=TOWER,
    ),
    global_batch=8,
    rounds=2,
    warm_up=1,
)
MIB = 1 << 20


def test_every_side_takes_the_same_steps_and_says_what_it_holds():
    rows = run(CASE, ranks=(2,))
    assert [(row["side"], row["ranks"]) for row in rows] == [
        ("plain", 1),
        ("zero0", 1),
        ("zero3", 2),
        ("zero3+checkpointing", 2),
    ]
    plain, zero0, zero3, checkpointed = rows
    assert plain["ratio_to_plain"] == plain["cpu_ratio_to_plain"] == 1.0
    for row in rows:
        # The same weights, batch and updates, so the same loss after two of them.
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert row["moments"] == 2 * row["weights"]
        assert 0 < row["fastest_seconds"] <= row["seconds"]
        assert row["fastest_ratio_to_plain"] > 0
    assert zero0["weights"] == plain["weights"]
    for row in (zero3, checkpointed):
        assert row["weights"] == pytest.approx(plain["weights"] / 2, rel=0.05)
        assert row["weights_over_share"] == pytest.approx(1.0, abs=0.05)
        assert row["moments_over_share"] == pytest.approx(1.0, abs=0.05)
        assert 0 < row["kept_whole"] <= plain["weights"]
    assert checkpointed["peak"] < zero3["peak"]


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="batch 8 is not divisible by 3 ranks"):
        run(CASE, ranks=(1, 3))


def test_the_peak_is_what_was_alive_together():
    held = torch.zeros(MIB, dtype=torch.uint8)

    def work() -> None:
        held.add_(1)  # nothing new
        for _ in range(3):
            a = torch.ones(MIB, dtype=torch.uint8)
            b = a + 1
            del a
            b.view(2, -1)[0].zero_()  # a view is no memory of its own
            c = b + held
            del b, c

    assert peak_bytes(work, torch.device("cpu")) == 2 * MIB


def test_the_peak_sees_what_is_saved_for_backward():
    weight = torch.ones(MIB // 4, requires_grad=True)

    def chain(length: int) -> int:
        def work() -> None:
            value = weight
            for _ in range(length):
                value = value.sin()  # saves its input
            value.sum().backward()
            weight.grad = None

        return peak_bytes(work, torch.device("cpu"))

    assert chain(8) - chain(4) == 4 * MIB


def test_a_table_says_shared_figures_once():
    rows = [{"n": 1, "name": "a", "x": 0.123456}, {"n": 1, "name": "bb", "y": None}]
    assert format_rows(rows) == "n 1, y -\nname       x\n   a  0.1235\n  bb       -"
