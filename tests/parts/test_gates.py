"""Gates that learn: what their multipliers do, and towers that have hardly anything to close."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.models.test_gated import tower_of
from trainer.comm import Comm
from trainer.losses.sparse_gates import Sides, prunable_weights
from trainer.models.gated import GatedTower
from trainer.models.narrow import NarrowShape, narrowed
from trainer.parts.gates import GatesConfig, LearnedGates, StageConfig


def learned(
    tower: GatedTower, *, sides: Sides, target: float, steps: int = 30, ramp: float = 0.5
) -> LearnedGates:
    stage = StageConfig(steps=steps, target=target)
    config = GatesConfig(
        stages=(stage,), learning_rate=0.4, multiplier=20.0, sides=sides, ramp=ramp
    )
    whole = prunable_weights(tower.sizes, head_dim=tower.head_dim)
    return LearnedGates(config, 0, {"image": tower}, whole=whole, comm=Comm.solo(), seed=0)


def history(gates: LearnedGates, steps: int) -> list[tuple[float, float, float]]:
    """Before each step: the sparsity, and both multipliers. Nothing but they pulls at the gates."""
    found = []
    for step in range(steps):
        linear, square = (float(one.detach()) for one in gates.multipliers)
        found.append((float(gates.sparsity().detach()), linear, square))
        gates.after_step(step, applied=True, learning_rate_factor=1.0)
    return found


def test_what_is_asked_for_grows_along_a_line_and_then_stays() -> None:
    gates = learned(GatedTower(tower_of("image")), sides="two", target=0.6, steps=40)
    asked = []
    for gates.learned in (0, 5, 10, 20, 39):
        asked.append(gates.wanted())
    assert asked == pytest.approx([0.0, 0.15, 0.3, 0.6, 0.6])


@pytest.mark.heavy
def test_on_one_side_multipliers_only_grow_and_on_two_they_pull_back() -> None:
    one, two = (
        history(learned(GatedTower(tower_of("image")), sides=sides, target=0.3), 60)
        for sides in ("one", "two")  # type: ignore[attr-defined]
    )
    for place in (1, 2):
        grows = [row[place] for row in one]
        assert all(later >= earlier for earlier, later in pairwise(grows))
    assert one[-1][0] > 0.4, "what was overshot stays"
    pulled = [row[1] for row in two]
    assert any(later < earlier for earlier, later in pairwise(pulled))
    assert abs(two[-1][0] - 0.3) < one[-1][0] - 0.3


def test_a_step_that_is_not_applied_changes_nothing() -> None:
    gates = learned(GatedTower(tower_of("image")), sides="two", target=0.5)
    before = {name: value.clone() for name, value in dict(gates.state_share()).items()}
    drawn = gates.towers["image"].drawn
    gates.after_step(0, applied=False, learning_rate_factor=1.0)
    assert all(
        torch.equal(value, before[name]) for name, value in dict(gates.state_share()).items()
    )
    assert drawn is not None
    assert torch.equal(gates.towers["image"].drawn.hidden, drawn.hidden)


@pytest.mark.parametrize("heads", [(0, 0, 0), (3, 0, 1)])
def test_a_tower_of_odd_heads_and_of_none_learns_further(heads: tuple[int, ...]) -> None:
    """A second stage, of layers that have lost all heads or neurons before."""
    shape = NarrowShape(30, 8, heads, (0, 5, 24))
    small = narrowed(tower_of("image"), shape)
    gates = learned(GatedTower(small), sides="two", target=0.5)
    history(gates, 40)
    final = gates.final()["image"]
    assert final.heads.sum(dim=1).le(torch.tensor(heads)).all()
    assert final.neurons.sum(dim=1).le(torch.tensor([0, 5, 24])).all()
    assert 0 < final.hidden.sum() < 30
    state = dict(gates.state_share())
    again = learned(GatedTower(small), sides="two", target=0.5)
    again.load_state_dict(state)
    assert torch.equal(again.final()["image"].hidden, final.hidden)
