"""Periods: counted another way, exact where floats are not, the same after any restart."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import NEVER, Every, Period
from trainer.periods import Clock, due
from trainer.types import Progress

EPOCH = 1000


def period(text: str) -> Period:
    return TypeAdapter(Every).validate_python(text)


def track(steps: list[tuple[int, bool]]) -> list[Progress]:
    progress = [Progress()]
    for samples, applied in steps:
        progress.append(progress[-1].advance(samples=samples, applied=applied))
    return progress


def due_steps(every: Period, progress: list[Progress]) -> list[int]:
    return [
        number
        for number, (before, after) in enumerate(pairwise(progress))
        if due(every, before, after, epoch_size=EPOCH, seconds_since_last=0.0)
    ]


STEPS = st.lists(st.tuples(st.integers(1, 700), st.booleans()), max_size=60)
PERIODS = st.sampled_from(
    [
        "1 steps",
        "2 steps",
        "3.5 steps",
        "7 steps",
        "64 samples",
        "250 samples",
        "1000 samples",
        "0.1 epochs",
        "0.3 epochs",
        "1 epochs",
        "1.7 epochs",
        "2 epochs",
    ]
)


@settings(deadline=None)
@given(STEPS, PERIODS)
def test_due_exactly_where_a_multiple_is_passed(steps: list[tuple[int, bool]], text: str) -> None:
    """Every multiple of the period up to the end, listed in exact decimals, is met once."""
    progress, (count, unit) = track(steps), text.split()
    size = Fraction(count) * (EPOCH if unit == "epochs" else 1)
    positions = [p.step if unit == "steps" else p.samples for p in progress]
    marks = [size * k for k in range(1, int(positions[-1] / size) + 1)]
    expected = {bisect_left(positions, mark) - 1 for mark in marks}
    assert due_steps(period(text), progress) == sorted(expected)


@settings(deadline=None)
@given(STEPS, st.integers(0, 60), PERIODS)
def test_a_restart_changes_nothing(steps: list[tuple[int, bool]], cut: int, text: str) -> None:
    progress, every = track(steps), period(text)
    cut = min(cut, len(steps))
    parts = due_steps(every, progress[: cut + 1])
    parts += [cut + n for n in due_steps(every, progress[cut:])]
    assert parts == due_steps(every, progress)


def test_a_tenth_of_an_epoch_is_due_on_its_last_sample() -> None:
    """0.1 in binary is a little more than 0.1; the user's decimal counts."""
    before, after = Progress(step=9, samples=90), Progress(step=10, samples=100)
    assert due(period("0.1 epochs"), before, after, epoch_size=EPOCH, seconds_since_last=0.0)


def test_minutes_follow_the_clock_alone() -> None:
    here = Progress(step=5, samples=50)
    for seconds, expected in [(0.0, False), (89.9, False), (90.0, True), (1e6, True)]:
        answer = due(period("1.5 min"), here, here, epoch_size=EPOCH, seconds_since_last=seconds)
        assert answer is expected


def test_never_is_never() -> None:
    far = Progress(step=10**9, samples=10**12)
    assert not due(NEVER, Progress(), far, epoch_size=1, seconds_since_last=1e12)


@pytest.mark.parametrize("count", ["0 steps", "0 min", "0.0 epochs"])
def test_an_empty_period_is_refused_with_the_way_out(count: str) -> None:
    with pytest.raises(ValidationError, match="write '1000 steps', '30 min' or 'never'"):
        period(count)


def minutes_on_ranks(comm: Comm) -> list[bool]:
    """Rank 0 asks for a tiny fraction of a minute, the other ranks for a year."""
    every = period("0.000000001 min" if comm.is_main else "600000 min")
    clock, answers = Clock(comm, epoch_size=EPOCH), []
    for step in range(6):
        before, after = Progress(step, step), Progress(step + 1, step + 1)
        answers.append(clock.due("save", every, before, after))
        clock.due("other", period("600000 min"), before, after)
    return answers


def test_rank_zero_rules_the_minutes() -> None:
    first, second = run_ranks(minutes_on_ranks, 2)
    assert first == second
    assert first == [False, True, False, True, False, True]
