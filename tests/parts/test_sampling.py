"""Samples and starting tables as functions of global rows (invariants 12, 13, 16, 17, 18)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.parts.initial_rows import normal_rows
from trainer.parts.sampling import BLOCK, sampled_ids


def whole(count, **changes):
    how = {"rate": 0.3, "sampling": "rows", "seed": 5, "step": 7} | changes
    return sampled_ids(0, count, **how)


@given(
    cuts=st.lists(st.integers(0, 1000), max_size=5),
    sampling=st.sampled_from(["rows", "blocks"]),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_every_division_of_the_rows_draws_the_same_sample(cuts, sampling, rate):
    edges = [0, *sorted(cuts), 1000]
    how = {"rate": rate, "sampling": sampling, "seed": 5, "step": 7}
    parts = [sampled_ids(a, b, **how) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), sampled_ids(0, 1000, **how))


def test_every_slot_of_a_step_draws_another_sample():
    draws = [frozenset(whole(1000, slot=slot).tolist()) for slot in (None, 0, 1, 2)]
    assert len(set(draws)) == 4
    assert all(len(a & b) < 0.5 * len(a) for a, b in pairwise(draws))


def test_samples_of_ranges_longer_than_what_is_hashed_at_a_time():
    count = 200_001
    parts = [
        sampled_ids(a, b, rate=0.1, sampling="rows", seed=5, step=7)
        for a, b in ((0, 65_537), (65_537, 140_000), (140_000, count))
    ]
    assert torch.equal(torch.cat(parts), whole(count, rate=0.1))


def test_other_steps_and_seeds_draw_others_and_ids_ascend():
    samples = [whole(500, step=s, seed=d) for s in range(4) for d in range(2)]
    assert len({tuple(s.tolist()) for s in samples}) == 8
    assert all(bool((s.diff() > 0).all()) for s in samples)


def test_a_rate_of_one_is_every_row_and_zero_is_none():
    for sampling in ("rows", "blocks"):
        assert torch.equal(whole(300, rate=1.0, sampling=sampling), torch.arange(300))
        assert len(whole(300, rate=0.0, sampling=sampling)) == 0


def test_blocks_are_whole_and_ragged_at_the_end_only():
    ids = whole(5 * BLOCK * 8 + 17, sampling="blocks", rate=0.5)
    counts = torch.bincount(ids // BLOCK)
    assert set(counts[:-1].tolist()) <= {0, BLOCK}
    assert int(counts[-1]) in {0, 17, BLOCK}


@pytest.mark.heavy
@pytest.mark.parametrize("sampling", ["rows", "blocks"])
def test_every_row_is_drawn_as_often_as_the_rate_says(sampling):
    """Within five standard deviations, each row over the steps and each step over the rows."""
    rate, steps, count = 0.1, 600, 1024
    drawn = torch.zeros(steps, count)
    for step in range(steps):
        drawn[step, whole(count, rate=rate, step=step, sampling=sampling)] = 1
    deviation = math.sqrt(rate * (1 - rate))
    assert (drawn.mean(0) - rate).abs().max() < 5 * deviation / math.sqrt(steps)
    independent = count if sampling == "rows" else count // BLOCK
    assert (drawn.mean(1) - rate).abs().max() < 5 * deviation / math.sqrt(independent)


@given(cuts=st.lists(st.integers(0, 300), max_size=4), dim=st.sampled_from([1, 6, 7]))
def test_every_division_starts_with_the_same_table(cuts, dim):
    edges = [0, *sorted(cuts), 300]
    parts = [normal_rows(a, b, dim, deviation=0.01, seed=3) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), normal_rows(0, 300, dim, deviation=0.01, seed=3))


def test_the_table_is_normal_and_no_two_rows_are_alike():
    """Moments, the share within one deviation, and correlations, at five standard errors."""
    rows = normal_rows(0, 4000, 15, deviation=2.0, seed=1).double() / 2
    count = rows.numel()
    assert rows.mean().abs() < 5 / math.sqrt(count)
    assert (rows.square().mean() - 1).abs() < 5 * math.sqrt(2 / count)
    assert (rows.pow(4).mean() - 3).abs() < 5 * math.sqrt(96 / count)
    assert ((rows.abs() < 1).double().mean() - 0.682689).abs() < 5 * 0.4654 / math.sqrt(count)
    correlation = torch.corrcoef(rows.T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(4000)
    assert len(rows.unique(dim=0)) == 4000
    assert not torch.equal(rows, normal_rows(0, 4000, 15, deviation=2.0, seed=2).double() / 2)
