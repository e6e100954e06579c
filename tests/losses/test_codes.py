"""Vector quantisation against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.losses import codes as module
from trainer.losses.codes import Choice, nearest_codes, quantise, share_used, soft_choice, untold

BATCH, PATCHES, DIM, CODES = 4, 5, 3, 7


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(BATCH, PATCHES, DIM, generator=draw, dtype=torch.float64)
    return states, torch.randn(CODES, DIM, generator=draw, dtype=torch.float64)


@torch.no_grad()
def brute(state: Tensor, rows: Tensor) -> int:
    return min(range(len(rows)), key=lambda k: (float((state - rows[k]).square().sum()), k))


def test_codes_are_the_nearest_by_brute_force_in_blocks_too(monkeypatch):
    states, rows = drawn()
    expected = [brute(state, rows) for state in states.flatten(0, 1)]
    assert nearest_codes(states.flatten(0, 1), rows).tolist() == expected
    monkeypatch.setattr(module, "_BLOCK", 3 * CODES)  # three states at a time, and a rest
    assert nearest_codes(states.flatten(0, 1), rows).tolist() == expected
    assert len(set(expected)) > 2
    twice = torch.cat([rows, rows])
    assert nearest_codes(states.flatten(0, 1), twice).tolist() == expected, "not the first"


def test_values_are_codes_and_gradients_pass_straight_through():
    """Of g.z_q + a commitment + b codebook: to z go g and the commitment's, to e the codebook's."""
    states, rows = (x.requires_grad_() for x in drawn())
    draw = torch.Generator().manual_seed(3)
    pull = torch.randn(states.shape, generator=draw, dtype=torch.float64)
    found = quantise(states, rows)
    torch.testing.assert_close(found.states, rows[found.codes], rtol=0, atol=1e-15)
    a, b = 0.7, 0.3
    ((found.states * pull).sum() + a * found.commitment.sum() + b * found.codebook.sum()).backward()
    to_states, to_rows = torch.zeros_like(states), torch.zeros_like(rows)
    with torch.no_grad():
        for i in range(BATCH):
            costs = []
            for j in range(PATCHES):
                k = brute(states[i, j], rows)
                gap = states[i, j] - rows[k]
                to_states[i, j] = pull[i, j] + a * 2 * gap / (PATCHES * DIM)
                to_rows[k] -= b * 2 * gap / (PATCHES * DIM)
                costs.append(gap.square().mean())
            assert found.commitment[i].item() == pytest.approx(float(sum(costs)) / PATCHES)
            assert found.codebook[i].item() == pytest.approx(found.commitment[i].item(), rel=1e-12)
    torch.testing.assert_close(states.grad, to_states)
    torch.testing.assert_close(rows.grad, to_rows)


def of_rank(comm: Comm) -> tuple[float, float, Tensor]:
    states, rows = drawn()
    own = slice(comm.rank * BATCH // comm.world_size, (comm.rank + 1) * BATCH // comm.world_size)
    mine = states[own].requires_grad_()
    loss = untold(soft_choice(mine, rows, temperature=0.5), comm)
    loss.backward()
    used = share_used(quantise(states[own], rows).codes, CODES, comm)
    return loss.item(), used.item(), mine.grad / comm.world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_untold_is_of_all_ranks_batch(world_size):
    """ln K minus the mutual information of code and patch, by loops over both."""
    states, rows = (x.requires_grad_() for x in drawn())
    p = torch.stack(
        [
            (-(state - rows).square().sum(dim=1) / 0.5).softmax(dim=0)
            for state in states.flatten(0, 1)
        ]
    )
    mean = p.mean(dim=0)
    told = (p * (p / mean).log()).sum(dim=1).mean()
    (math.log(CODES) - told).backward()
    results = run_ranks(of_rank, world_size)
    for loss, used, _ in results:
        assert loss == pytest.approx(math.log(CODES) - told.item(), rel=1e-12)
        expected = {brute(state, rows) for state in states.flatten(0, 1)}
        assert used == pytest.approx(len(expected) / CODES)
    gradient = torch.cat([gradient for _, _, gradient in results])
    torch.testing.assert_close(gradient, states.grad)


def test_all_is_told_by_codes_that_are_sure_and_even_and_nothing_by_one_for_all():
    eye = torch.eye(4, dtype=torch.float64)
    sure = soft_choice(eye[:, None], eye, temperature=1e-3)
    assert untold(sure, Comm.solo()).item() == pytest.approx(0, abs=1e-9)
    alike = Choice(eye[:1].expand(4, 4), torch.zeros(4, dtype=torch.float64))
    assert untold(alike, Comm.solo()).item() == pytest.approx(math.log(4))
