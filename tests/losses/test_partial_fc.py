"""Margin softmax over a sharded table, against arrays that the published code computed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.losses.rank_cases import Arrays, golden
from tests.losses.sharded_cases import PARTIAL_FC, SLOTS, results
from tests.losses.test_golden import assert_gradient, assert_value

FLOOR = -np.log(1e-30)
"""The published value of a row is no larger, whatever its gradient: we report the true one."""


def of_ranks(path: str) -> dict[str, np.ndarray]:
    """Values of every rank stacked; the shards' gradients joined."""
    ranks = [cases[path] for cases in results(int(golden(path)["world_size"]))]
    sharded = {"grad_weight", "one_pass_rows", "one_pass_ids"}
    joined = {
        name: np.stack([rank[name] for rank in ranks]) for name in ranks[0] if name not in sharded
    }
    if "one_pass_rows" in ranks[0]:
        joined["one_pass_weight"] = _table(ranks, int(golden(path)["num_classes"]))
    return {**joined, "grad_weight": np.concatenate([rank["grad_weight"] for rank in ranks])}


def _table(ranks: list[Arrays], count: int) -> np.ndarray:
    """The rows that took part, spread over the whole table: zero elsewhere."""
    table = np.zeros((count, ranks[0]["one_pass_rows"].shape[1]))
    for rank in ranks:
        table[rank["one_pass_ids"]] = rank["one_pass_rows"]
    return table


def test_all_files_are_here() -> None:
    assert (len(PARTIAL_FC), len(SLOTS)) == (16, 4)


@pytest.mark.parametrize("path", PARTIAL_FC)
def test_cross_entropy_equals_the_published_one(path: str) -> None:
    """Equal on all ranks, feature gradients times the ranks, row gradients complete."""
    theirs, ours = golden(path), of_ranks(path)
    assert_value(np.minimum(ours["row_loss"], FLOOR).mean(axis=1), theirs["loss"])
    assert_gradient(ours["grad_features"], theirs["grad_features"])
    assert_gradient(ours["grad_weight"], theirs["grad_weight"])
    if "one_pass_loss" in ours:
        assert_gradient(ours["one_pass_features"], theirs["grad_features"])
        assert_gradient(ours["one_pass_weight"], theirs["grad_weight"])
        assert_value(ours["one_pass_loss"], ours["loss"])
    if ours["row_loss"].max() < FLOOR:
        assert_value(ours["loss"], theirs["loss"])


@pytest.mark.parametrize("path", SLOTS)
def test_eight_cross_entropies_with_a_sample_each(path: str) -> None:
    """The published gradient is that of the sum of the slots; ours that of the reported mean."""
    theirs, ours = golden(path), of_ranks(path)
    ranks = int(theirs["world_size"])
    for rank in range(ranks):
        rows = ours["row_loss"][rank]
        assert_value(np.minimum(rows, FLOOR).mean(), theirs["loss_fp64"])
        assert_value(rows.mean(), theirs["loss_fp64_without_floor"])
    assert_gradient(ours["grad_features"] / ranks, theirs["grad_features_of_mean_fp64"])
    assert_gradient(ours["grad_weight"], theirs["grad_weight_of_mean_fp64"])
    for name, factor in (("grad_features", 8), ("grad_weight", 8)):
        published = theirs[name]
        assert np.abs(ours[name] * factor - published).max() <= 1e-5 * np.abs(published).max() * 10
