"""Temperatures stay within bounds, are exact at the start, and always find the way back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.models.scales import LearnedBias, LearnedScale


def number(value: torch.Tensor) -> float:
    return value.detach().item()


def scale_at(log: float, *, largest: float = 100.0) -> LearnedScale:
    scale = LearnedScale(10.0, largest=largest)
    with torch.no_grad():
        scale.shift.fill_(log - math.log(10.0))
    return scale


@pytest.mark.heavy
@given(log=st.floats(-50, 50), largest=st.floats(1.5, 1000))
def test_any_parameter_gives_a_value_within_the_bounds(log: float, largest: float) -> None:
    value = number(scale_at(log, largest=largest)())
    assert 1.0 <= value <= largest * (1 + 1e-6)


@given(log=st.floats(0.01, math.log(100.0) - 0.01))
def test_inside_the_bounds_it_is_the_exponential(log: float) -> None:
    scale = scale_at(log)
    value = scale()
    value.backward()
    assert number(value) == pytest.approx(math.exp(log), rel=2e-6)
    assert float(scale.shift.grad) == pytest.approx(math.exp(log), rel=2e-6)


@pytest.mark.parametrize("log", [-0.3, 0.4, 4.5, 4.75])
def test_gradient_is_the_derivative_of_the_value(log: float) -> None:
    scale = scale_at(log)
    scale().backward()
    step = 1e-3
    difference = (number(scale_at(log + step)()) - number(scale_at(log - step)())) / (2 * step)
    assert float(scale.shift.grad) == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize(("wish", "bound"), [(-1.0, 100.0), (1.0, 1.0)])
def test_long_pressure_against_a_bound_does_not_wind_up(wish: float, bound: float) -> None:
    """After 400 steps against the bound, 40 steps the other way leave it again."""
    scale = scale_at(math.log(30.0 if wish < 0 else 3.0))
    optimizer = torch.optim.Adam(scale.parameters(), lr=0.02)

    def follow(sign: float, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            (sign * scale().log()).backward()
            optimizer.step()
        return number(scale())

    assert math.log(follow(wish, 400)) == pytest.approx(math.log(bound), abs=0.15)
    moved = math.log(follow(-wish, 40))
    assert abs(moved - math.log(bound)) > 0.3


@pytest.mark.parametrize("initial", [1 / 0.07, 10.0, 100.0, 1.0])
def test_bfloat16_keeps_the_start_exact(initial: float) -> None:
    scale = LearnedScale(initial, largest=100.0).bfloat16()
    assert scale().dtype == torch.float32
    assert number(scale()) == pytest.approx(initial, rel=1e-6)
    bias = LearnedBias(-10.0 / 3).bfloat16()
    assert number(bias()) == pytest.approx(-10.0 / 3, rel=1e-6)
