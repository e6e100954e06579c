"""The multi-label losses, against arrays of the published formula and against themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.losses.rank_cases import golden
from tests.losses.sharded_cases import MULTILABEL, UNBOUNDED, results
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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_scale_without_fixed_reference(world_size: int) -> None:
    """The maximum over ranks takes its place; against the whole matrix."""
    arrays = {name: torch.from_numpy(v) for name, v in golden(UNBOUNDED).items() if v.ndim}
    features = arrays["features"][:6].requires_grad_()
    table = arrays["weight"].requires_grad_()
    labels = arrays["labels"][:6].clone()
    labels[::2, 1] = labels[::2, 0]
    cosines = normalize(features) @ normalize(table).T
    negative = torch.zeros(6, 60, dtype=torch.bool)
    negative[:, ::2] = True
    negative[torch.arange(6)[:, None], labels] = False
    pulls = -150 * (cosines.gather(1, labels) - 0.3)
    pushes = (150 * cosines).masked_fill(~negative, -torch.inf)
    zero = torch.zeros(6, 1, dtype=torch.float64)
    terms = (torch.cat([zero, part], dim=1).logsumexp(dim=1) for part in (pulls, pushes))
    loss = sum(term.mean() for term in terms)
    loss.backward()
    ranks = [cases["unbounded"] for cases in results(world_size)]
    for ours in ranks:
        assert_value(ours["loss"], loss.detach().numpy())
        if "active_rows" in ours:
            assert ours["active_rows"] == 30
            assert_value(ours["negative_cosine"], cosines[negative].mean().detach().numpy())
    ours = np.concatenate([rank["grad_features"] for rank in ranks])
    assert_gradient(ours / world_size, features.grad.numpy())
    assert_gradient(np.concatenate([r["grad_weight"] for r in ranks]), table.grad.numpy())
