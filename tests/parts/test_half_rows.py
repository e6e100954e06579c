"""Rows in half the memory: what rounding at random keeps, and that nobody can tell who did it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.parts.head_cases import batch_of, config_of, new_head, take_step
from trainer.comm import Comm
from trainer.errors import CheckpointError
from trainer.parts.half_rows import HalfRowOptimizer, codes_of, rounded, spread, squares_of
from trainer.parts.row_optimizer import RowOptimizer, RowOptimizerConfig

COUNT, DIM = 23, 48
CONFIG = RowOptimizerConfig(learning_rate=0.01, weight_decay=0.3, rows="bfloat16")
FIELDS = ("rows", "exp_avg", "exp_avg_sq", "steps", "paid")


def fields(held: HalfRowOptimizer) -> dict[str, Tensor]:
    return {"rows": held.rows, **held.moments, "steps": held.steps, "paid": held.paid}


def steps_of(held: HalfRowOptimizer, first: int, last: int, *, num_steps: int = 5) -> None:
    """Steps on those of the drawn rows that this range holds; gradients are of the whole table."""
    draw = torch.Generator().manual_seed(4)
    for step in range(num_steps):
        places = torch.randperm(COUNT, generator=draw)[:9]
        gradient = torch.randn(9, DIM, generator=draw)
        own = (places >= first) & (places < last)
        held.update(places[own] - first, gradient[own], factor=1.0 / (1 + step))


def test_rounding_goes_to_a_neighbour_and_keeps_the_expectation() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1, 64, generator=draw) * 10.0 ** torch.arange(-8, 8).repeat(4)
    noise = torch.randint(0, 1 << 32, (20_000, 1), generator=draw)
    chance = spread(noise[:, 0], 64)
    for bits in (chance & 0xFFFF, chance >> 16):
        found = rounded(values.expand_as(bits).contiguous(), bits)
        below = (values.view(torch.int32) & -0x10000).view(torch.float32)
        above = (below.view(torch.int32) + 0x10000).view(torch.float32)
        assert ((found == below) | (found == above)).all()
        gap = (above - below).abs()
        error = (found.double().mean(0, keepdim=True) - values).abs() / gap
        assert float(error.max()) < 5 * 0.5 / 20_000**0.5
    assert abs(float(torch.corrcoef(chance[:, :8].T.double()).triu(1).abs().max())) < 0.05


def test_a_number_that_is_a_half_already_stays() -> None:
    values = torch.randn(7, DIM).bfloat16().float()
    bits = spread(torch.arange(7) * 12345, DIM) & 0xFFFF
    assert torch.equal(rounded(values, bits).float(), values)


def test_every_division_of_the_table_gives_the_same_bits() -> None:
    table = torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(1))
    whole = HalfRowOptimizer(table, CONFIG, seed=7)
    steps_of(whole, 0, COUNT)
    for ends in ((0, 9, COUNT), (0, 1, 2, 20, COUNT)):
        for first, last in pairwise(ends):
            part = HalfRowOptimizer(table[first:last], CONFIG, first=first, seed=7)
            steps_of(part, first, last)
            for name, value in fields(part).items():
                assert torch.equal(value, fields(whole)[name][first:last]), name
    other = HalfRowOptimizer(table, CONFIG, seed=8)
    steps_of(other, 0, COUNT)
    assert not torch.equal(other.rows, whole.rows)


@pytest.mark.heavy
def test_steps_below_the_last_bit_are_not_lost() -> None:
    """A thousandth of the last bit a step: nearest neighbours would stay where they are."""
    config = RowOptimizerConfig(learning_rate=2.0**-17, weight_decay=0.0, rows="bfloat16")
    held = HalfRowOptimizer(torch.ones(500, DIM), config)
    for _ in range(200):
        held.update(None, torch.ones(500, DIM), factor=1.0)
    moved = 1.0 - held.rows.double().mean()
    assert float(moved) == pytest.approx(200 * 2.0**-17, rel=0.05)


def test_a_byte_of_a_mean_square_is_a_neighbour_and_keeps_the_expectation() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(1, 64, generator=draw) * 10.0 ** torch.arange(-14, 2).repeat(4)
    noise = torch.randint(0, 1 << 32, (20_000,), generator=draw)
    codes = codes_of(values.expand(20_000, 64).contiguous(), spread(noise, 64) >> 11)
    assert (codes.amax(0) - codes.amin(0) <= 1).all()
    found = squares_of(codes).double()
    gap = squares_of(codes.amin(0) + 1).double() - squares_of(codes.amin(0)).double()
    assert float(((found.mean(0) - values[0]).abs() / gap).max()) < 5 * 0.5 / 20_000**0.5
    ends = torch.tensor([[0.0, 1e-30, 1e9]])
    assert codes_of(ends, torch.zeros(1, 3).long()).tolist() == [[0, 1, 255]]


def test_one_step_is_adamw() -> None:
    """In float64, from the moments as they were kept, to the last bit of a half; a mean square to
    the last of its byte."""
    draw = torch.Generator().manual_seed(2)
    held = HalfRowOptimizer(torch.randn(COUNT, DIM, generator=draw), CONFIG)
    for step in range(1, 4):
        before, mean = held.rows.double(), held.moments["exp_avg"].double()
        square = squares_of(held.moments["exp_avg_sq"]).double()
        gradient = torch.randn(COUNT, DIM, generator=draw)
        held.update(None, gradient.clone(), factor=1.0)
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.98 * square + 0.02 * gradient.double().square()
        below = (square / (1 - 0.98**step)).sqrt() + 1e-8
        rows = before * (1 - 0.01 * 0.3) - 0.01 / (1 - 0.9**step) * mean / below
        kept = squares_of(held.moments["exp_avg_sq"])
        for found, wanted, bit in (
            (held.rows, rows, 2.0**-7),
            (held.moments["exp_avg"], mean, 2.0**-7),
            (kept, square, 0.25),
        ):
            assert ((found.double() - wanted).abs() <= wanted.abs() * bit + 1e-6).all()


def test_untouched_rows_owe_their_decay_as_float32_rows_do() -> None:
    table = torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(1))
    ours = HalfRowOptimizer(table, CONFIG)
    theirs = RowOptimizer(ours.rows.float(), CONFIG.model_copy(update={"rows": "float32"}))
    for held in (ours, theirs):
        for step in range(4):
            held.update(
                torch.arange(1, COUNT), torch.zeros(COUNT - 1, DIM), factor=1.0 / (1 + step)
            )
    torch.testing.assert_close(ours.taken(torch.tensor([0])), theirs.taken(torch.tensor([0])))
    assert torch.equal(ours.rows[0], table[0].bfloat16())


def test_a_million_rows_of_768_take_three_and_a_half_gib() -> None:
    held = HalfRowOptimizer(torch.zeros(1000, 768), CONFIG)
    whole = RowOptimizer(torch.zeros(1000, 768), RowOptimizerConfig())
    sizes = [
        sum(value.nbytes for value in fields(one).values()) * 1000 / 2**30 for one in (held, whole)
    ]
    assert sizes[0] < 3.6
    assert sizes[1] > 8.5


def test_a_checkpoint_goes_on_with_other_ranks_to_the_same_bits() -> None:
    """A head saved whole is restored into the ranges of three ranks; their next step is its own."""
    config = config_of("sampled", optimizer="adamw", rows="bfloat16")
    head = new_head(Comm.solo(), config, 17)
    for step in range(3):
        features, labels = batch_of(step, 17)
        take_step(head, features, labels, torch.ones(7, dtype=torch.bool), step)
    state = dict(head.state_share())
    assert state["rows/0000000000-0000000017"].dtype == torch.bfloat16
    places, gradient = torch.arange(17), torch.randn(17, 6)
    parts = []
    for rank in range(3):
        part = new_head(Comm(rank, 3, torch.device("cpu")), config, 17, seed=99)
        part.load_state_dict(state)
        first, last = part.row_range
        part._optimizer.update(None, gradient[first:last].clone(), factor=1.0)
        parts.append(part._fields())
    head._optimizer.update(places, gradient.clone(), factor=1.0)
    for name, value in head._fields().items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value), name


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_rows_of_the_other_precision_are_refused(kept: str) -> None:
    """Moments of the two have other meanings, so converting numbers would not do."""
    asked = "bfloat16" if kept == "float32" else "float32"
    made, other = (
        new_head(Comm.solo(), config_of("sampled", optimizer="adamw", rows=each), COUNT)
        for each in (kept, asked)
    )
    with pytest.raises(CheckpointError, match=f"rows in {kept}, and head.rows asks for {asked}"):
        other.load_state_dict(dict(made.state_share()))


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="dense needs a float32 gradient"):
        RowOptimizerConfig(rows="bfloat16", dense=True)
    with pytest.raises(ValueError, match="rows"):
        RowOptimizerConfig(rows="bfloat16", optimizer="sgd")
