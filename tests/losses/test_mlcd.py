"""The multi-label losses, against arrays of the published formula and against themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tests.losses.rank_cases import golden
from tests.losses.sharded_cases import MULTILABEL, results
from tests.losses.test_golden import assert_gradient, assert_value


def test_all_files_are_here() -> None:
    assert len(MULTILABEL) == 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("path", MULTILABEL)
def test_equals_the_formula_for_every_split(path: str, world_size: int) -> None:
    """Three ranks don't divide eight rows; nor two of the other sizes sixty classes."""
    theirs, ranks = golden(path), [cases[path] for cases in results(world_size)]
    for ours in ranks:
        assert_value(ours["loss"], theirs["loss"])
        np.testing.assert_allclose(ours["row_loss"], theirs["row_loss"], rtol=1e-9, atol=1e-12)
        for name in ("row_positive_term", "row_negative_term"):
            if name in theirs:
                assert_value(ours[name], theirs[name].mean())
    features = np.concatenate([ours["grad_features"] for ours in ranks])
    assert_gradient(features / world_size, theirs["grad_features"])
    assert_gradient(np.concatenate([o["grad_weight"] for o in ranks]), theirs["grad_weight"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("path", MULTILABEL)
def test_gradients_in_the_forward_pass_are_the_same(path: str, world_size: int) -> None:
    """Rows are those that take part, in their order: spread them over the table."""
    theirs, ranks = golden(path), [cases[path] for cases in results(world_size)]
    table = np.zeros_like(theirs["weight"])
    for ours in ranks:
        assert_value(ours["one_pass_loss"], theirs["loss"])
        table[ours["one_pass_ids"]] = ours["one_pass_rows"]
    features = np.concatenate([ours["one_pass_features"] for ours in ranks])[:8]
    assert_gradient(features / world_size, theirs["grad_features"])
    assert_gradient(table, theirs["grad_weight"])
