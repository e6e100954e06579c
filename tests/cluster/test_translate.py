"""Group means against the published code's table and against a loop over groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.losses.dense import random_rows
from tests.losses.rank_cases import TRANSLATE_GROUPS, golden, results, translate_problem
from trainer.cluster import translate
from trainer.cluster.translate import group_means
from trainer.comm import Comm
from trainer.errors import DataError


def means_of(features: torch.Tensor, labels: torch.Tensor, num_groups: int):
    return group_means(features, labels, num_groups=num_groups, comm=Comm.solo())


def test_the_published_table_with_its_empty_groups() -> None:
    arrays = golden("protoclip/pbt_empty_clusters.npz")
    found = means_of(
        torch.from_numpy(arrays["student_features"]),
        torch.from_numpy(arrays["teacher_labels"]),
        int(arrays["num_clusters"]),
    )
    assert (arrays["counts"] == 0).sum() >= 2
    np.testing.assert_array_equal(found.counts.numpy(), arrays["counts"])
    np.testing.assert_allclose(found.rows.numpy(), arrays["table"], rtol=1e-9, atol=1e-15)


def test_mass_is_conserved_and_means_are_no_longer_than_one() -> None:
    features, labels = translate_problem()
    means = means_of(features, labels, TRANSLATE_GROUPS)
    kept = labels >= 0
    total = (means.counts[:, None] * means.rows).sum(dim=0)
    torch.testing.assert_close(total, features[kept].sum(dim=0), rtol=1e-12, atol=1e-13)
    assert means.counts.tolist() == labels[kept].bincount(minlength=TRANSLATE_GROUPS).tolist()
    assert means.rows.norm(dim=1).max() <= 1 + 1e-12


def test_means_are_linear_and_blind_to_the_order_of_samples() -> None:
    features, labels = translate_problem()
    other = random_rows(*features.shape, torch.Generator().manual_seed(5))
    mixed = means_of(2 * features - 3 * other, labels, TRANSLATE_GROUPS).rows
    one, two = (means_of(rows, labels, TRANSLATE_GROUPS).rows for rows in (features, other))
    torch.testing.assert_close(mixed, 2 * one - 3 * two, rtol=0, atol=1e-13)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(6))
    again = means_of(features[shuffled], labels[shuffled], TRANSLATE_GROUPS).rows
    torch.testing.assert_close(again, one, rtol=0, atol=1e-14)


def test_a_group_of_one_is_its_member() -> None:
    features = random_rows(6, 3, torch.Generator().manual_seed(1)).float()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(means_of(features, order, 6).rows[order], features)


def test_samples_without_a_label_belong_nowhere() -> None:
    means = means_of(torch.full((5, 3), torch.nan), torch.full((5,), -1), 4)
    assert torch.equal(means.rows, torch.zeros(4, 3))
    assert means.counts.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sums_over_shards_equal_the_mean_of_all(world_size: int) -> None:
    """Ranks hold different numbers of samples, one of them none, and 6 groups on 4 ranks."""
    features, labels = translate_problem()
    expected = torch.stack([features[labels == k].sum(dim=0) for k in range(TRANSLATE_GROUPS)])
    sizes = torch.stack([(labels == k).sum() for k in range(TRANSLATE_GROUPS)])
    ranks = [cases["translate"] for cases in results(world_size)]
    rows = np.concatenate([rank["rows"] for rank in ranks])
    counts = np.concatenate([rank["counts"] for rank in ranks])
    assert counts.tolist() == sizes.tolist()
    np.testing.assert_allclose(rows, expected / sizes.clamp_min(1)[:, None], rtol=0, atol=1e-14)
    for rank in ranks:
        np.testing.assert_array_equal(rank["rows_in_blocks"], rank["rows"])
    single = np.concatenate([rank["rows_in_float32"] for rank in ranks])
    np.testing.assert_allclose(single, results(1)[0]["translate"]["rows_in_float32"], atol=1e-7)


def test_groups_can_be_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = translate_problem()
    whole = means_of(features, labels, TRANSLATE_GROUPS)
    for block_elements in (1, 10, 23, 10_000):
        monkeypatch.setattr(translate, "BLOCK_ELEMENTS", block_elements)
        blocks = means_of(features, labels, TRANSLATE_GROUPS)
        torch.testing.assert_close(blocks, whole, rtol=0, atol=0)


def test_labels_of_another_clustering_are_refused() -> None:
    with pytest.raises(DataError, match="a label is 7 but there are only 7 groups"):
        means_of(torch.zeros(3, 2), torch.tensor([0, 7, -1]), 7)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_wrong_label_of_one_rank_is_refused_on_all(world_size: int) -> None:
    assert all(cases["translate"]["refused"] for cases in results(world_size))
