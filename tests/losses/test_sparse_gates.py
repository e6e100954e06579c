"""Gates against arrays that TinyCLIP's published code computed, and by algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.losses.rank_cases import golden
from trainer.losses.sparse_gates import (
    LARGEST,
    Gates,
    Multipliers,
    drawn,
    is_open,
    kept_weights,
    lagrangian,
    open_probability,
    prunable_weights,
    published_kept_weights,
    published_prunable_weights,
    softened,
    wanted_sparsity,
)

NAMES = ("hidden", "heads", "intermediate")


def arrays(name: str) -> dict[str, Tensor]:
    found = golden(f"tinyclip/{name}.npz")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in found.items()}


def near(ours: Tensor | float, theirs: Tensor, *, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(
        torch.as_tensor(ours).detach(), theirs.squeeze(), rtol=rtol, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_draws_probabilities_and_final_gates(name: str) -> None:
    given = arrays("l0_gates")
    log_alpha = given[f"loga_{name}"].requires_grad_()
    value = drawn(log_alpha, given[f"noise_{name}"])
    near(value, given[f"z_train_{name}"])
    (given[f"probe_{name}"] * value).sum().backward()
    near(log_alpha.grad, given[f"grad_loga_probe_{name}"])
    near(open_probability(log_alpha), given[f"prob_open_{name}"])
    near(softened(log_alpha), given[f"z_softmask_{name}"])
    published = given[f"z_eval_{name}"].squeeze()
    assert torch.equal(is_open(log_alpha) > 0, published > 0)
    near(softened(log_alpha) * is_open(log_alpha), published)
    clamped = given[f"clamp_in_{name}"].clamp(-LARGEST, LARGEST)
    near(clamped, given[f"clamp_out_{name}"])


def gates_of(given: dict[str, Tensor], prefix: str) -> Gates:
    return Gates(*(given[f"{prefix}loga_{name}"].clone().requires_grad_() for name in NAMES))


def test_weights_of_open_gates_are_those_that_stay() -> None:
    given = arrays("l0_gates")
    gates = Gates(*map(is_open, gates_of(given, "")))
    head_dim = int(given["hidden_size"]) // int(given["num_heads"])
    layers = torch.stack([gates.heads.sum(1), gates.neurons.sum(1)], 1)
    by_hand = sum(gates.hidden.sum() * (4 * head_dim * h + 2 * n) for h, n in layers)
    assert float(kept_weights(gates, head_dim=head_dim)) == float(by_hand)
    assert float(by_hand) == float(given["remain_params_counted"])
    there = Gates(*(torch.ones_like(part) for part in gates))
    assert prunable_weights(there, head_dim=head_dim) == 3 * 12 * 16**2


@pytest.mark.parametrize("setting", ["a", "open10", "low"])
def test_sparsity_and_its_lagrangian(setting: str) -> None:
    given = arrays("l0_sparsity_lagrangian")
    head_dim = int(given["hidden_size"]) // int(given["num_heads"])
    for place, step in enumerate(given["steps"].tolist()):
        gates = gates_of(given, f"{setting}_")
        shares = Gates(*map(open_probability, gates))
        kept = published_kept_weights(shares, head_dim=head_dim)
        near(kept, given[f"{setting}_expected_params"])
        assert published_prunable_weights(gates) == int(given["prunable_params"])
        sparsity = 1 - kept / published_prunable_weights(gates)
        near(sparsity, given[f"{setting}_expected_sparsity"][place], rtol=1e-8)
        wanted = wanted_sparsity(
            step,
            start=float(given["start_sparsity"]),
            target=float(given["target_sparsity"]),
            steps=int(given["warmup_steps"]),
        )
        near(wanted, given[f"{setting}_target_sparsity_at_step"][place])
        multipliers = Multipliers(
            *(given[name].clone().requires_grad_() for name in ("lambda1", "lambda2"))
        )
        value = lagrangian(sparsity, wanted, multipliers, sides="one")
        near(value, given[f"{setting}_lagrangian"][place], rtol=1e-7)
        value.backward()
        for name, gate in zip(NAMES, gates, strict=True):
            near(gate.grad, given[f"{setting}_grad_loga_{name}"][place], rtol=1e-7)
        for name, one in zip(("lambda1", "lambda2"), multipliers, strict=True):
            near(one.grad, given[f"{setting}_grad_{name}"][place], rtol=1e-7)


def test_two_sides_pull_back_what_was_overshot() -> None:
    multipliers = Multipliers(torch.tensor(2.0), torch.tensor(3.0))
    for sparsity, one, two in ((0.1, 0.2 * 2 + 0.04 * 3, 0.52), (0.5, 0.0, -0.4 + 0.12)):
        p = torch.tensor(sparsity, requires_grad=True)
        near(lagrangian(p, 0.3, multipliers, sides="one"), torch.tensor(one), rtol=1e-5)
        near(lagrangian(p, 0.3, multipliers), torch.tensor(two), rtol=1e-5)
    lagrangian(p, 0.3, Multipliers(torch.tensor(0.0), torch.tensor(3.0))).backward()
    assert float(p.grad) > 0


def test_all_open_is_no_sparsity_and_every_gate_counts() -> None:
    sizes = Gates(torch.ones(16), torch.ones(3, 4), torch.ones(3, 64))
    whole = float(kept_weights(sizes, head_dim=4))
    assert whole == prunable_weights(sizes, head_dim=4)
    vit_b = Gates(torch.ones(768), torch.ones(12, 12), torch.ones(12, 3072))
    assert published_prunable_weights(vit_b) == 85_017_600
    for place in range(3):
        parts = list(sizes)
        parts[place] = parts[place].clone().fill_(0.9)
        assert float(kept_weights(Gates(*parts), head_dim=4)) < whole
    published = [(0.0, 0.83182), (math.log(100), 0.99798), (-math.log(100), 0.04714)]
    for log_alpha, probability in published:
        assert float(open_probability(torch.tensor(log_alpha))) == pytest.approx(
            probability, abs=2e-5
        )


def test_of_equal_gates_the_later_ones_close() -> None:
    gate = is_open(torch.zeros(2, 10))
    assert gate.sum(dim=1).tolist() == [8, 8]
    assert gate[0].tolist() == [1] * 8 + [0] * 2


def test_a_tower_keeps_a_channel_however_closed_its_gates_are() -> None:
    """Of ten gates that are as closed as they get, 0.47 are expected to be open."""
    closed = torch.full((10,), -LARGEST)
    assert is_open(closed).sum() == 0
    assert is_open(closed, least=1).tolist() == [1.0] + [0.0] * 9
    assert is_open(closed, least=1, multiple=4).sum() == 4


def test_the_share_of_open_gates_is_a_sum_over_pairs_and_every_gate_moves_it() -> None:
    """The closed form against the published outer product of a hidden and an inner gate."""
    draw = torch.Generator().manual_seed(2)
    shapes = ((8,), (3, 2), (3, 32))
    log_alpha = Gates(*(torch.randn(shape, generator=draw).double() for shape in shapes))
    leaves = Gates(*(part.requires_grad_() for part in log_alpha))
    shares = Gates(*map(open_probability, leaves))
    kept = kept_weights(shares, head_dim=4)
    by_pairs = 4 * 4 * torch.outer(shares.hidden, shares.heads.flatten()).sum()
    by_pairs = by_pairs + 2 * torch.outer(shares.hidden, shares.neurons.flatten()).sum()
    torch.testing.assert_close(kept, by_pairs, rtol=1e-13, atol=0)
    kept.backward()
    for part in leaves:
        assert part.grad is not None
        assert (part.grad > 0).all(), "opening a gate never makes a model smaller"


def test_with_all_gates_open_the_published_count_says_a_little_is_gone_and_ours_nothing() -> None:
    """The published form leaves a neuron's and a projection's biases out of what is kept."""
    vit_b = Gates(torch.ones(768), torch.ones(12, 12), torch.ones(12, 3072))
    published = published_kept_weights(vit_b, head_dim=64) / published_prunable_weights(vit_b)
    assert 1 - float(published) == pytest.approx(0.00056, abs=2e-5)
    assert float(kept_weights(vit_b, head_dim=64)) == prunable_weights(vit_b, head_dim=64)
