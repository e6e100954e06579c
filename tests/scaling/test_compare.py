"""Two recipes whose difference is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scaling.made import along_compute
from trainer.errors import ConfigError
from trainer.scaling.compare import compared
from trainer.scaling.fit import fit


def law_of(alpha, beta, *, seed=0, noise=0.01, **names):
    def error_of(compute):
        return beta * (compute / 1e18) ** alpha

    table = along_compute(error_of, noise=noise, seed=seed, **names)
    return fit(table, "power", resamples=300, seed=seed)


def test_equal_exponents_and_an_offset_are_told_apart():
    found = compared(law_of(-0.1, 0.4), law_of(-0.1, 0.36, seed=1, recipe="other"))
    assert not found.exponent.is_told
    assert found.offset.is_told
    assert found.offset.low < np.log10(0.9) < found.offset.high
    assert found.middle == pytest.approx(1e18)
    assert found.crossover is None
    assert found.share_that_cross < 0.05


def test_curves_that_cross_say_where_with_an_interval():
    found = compared(law_of(-0.10, 0.4), law_of(-0.14, 0.4 * 10**0.04, seed=1))
    assert found.exponent.is_told
    assert found.exponent.low < -0.04 < found.exponent.high
    assert found.crossover is not None
    assert found.crossover_interval is not None
    assert found.crossover_interval[0] < 1e19 < found.crossover_interval[1]
    assert found.crossover_interval[0] < found.crossover < found.crossover_interval[1]


def test_a_crossing_that_few_draws_see_has_no_interval():
    found = compared(law_of(-0.1, 0.4, noise=0.05), law_of(-0.1, 0.4, seed=1, noise=0.05))
    assert found.crossover_interval is None
    assert found.share_that_cross < 0.95


def test_curves_of_other_corpora_or_other_compute_are_not_compared():
    with pytest.raises(ConfigError, match=r"differ in corpus \('a' and 'b'\)"):
        compared(law_of(-0.1, 0.4, corpus="a"), law_of(-0.1, 0.4, corpus="b"))
    with pytest.raises(ConfigError, match="no compute in common"):
        compared(law_of(-0.1, 0.4), law_of(-0.1, 0.4, low=1e22, high=1e23))
