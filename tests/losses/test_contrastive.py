"""InfoNCE and the sigmoid loss against their naive forms; what they may hold in memory."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from tests.kernels.memory import largest_intermediate, saved_elements
from tests.losses.dense import dense_info_nce, dense_sigmoid, gradients, random_rows
from tests.losses.rank_cases import global_pairs, results
from trainer.comm import Comm
from trainer.losses import sigmoid
from trainer.losses.contrastive import info_nce
from trainer.losses.sigmoid import sigmoid_loss


def pairs(batch: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(batch)
    return tuple(random_rows(batch, dim, draw).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pair_losses_do_not_depend_on_the_ranks(world_size: int) -> None:
    image, text, scale, bias = (value.requires_grad_() for value in global_pairs())
    loss = dense_info_nce(image, text, scale) + dense_sigmoid(image, text, scale, bias)
    expected = gradients(loss, image, text, scale, bias)
    ranks = [cases["pairs"] for cases in results(world_size)]
    mean = {
        name: sum(torch.from_numpy(rank[name]) for rank in ranks) / world_size
        for name in ("loss", "grad_scale", "grad_bias")
    }
    rows = {
        name: torch.cat([torch.from_numpy(rank[name]) for rank in ranks]) / world_size
        for name in ("grad_image", "grad_text")
    }
    ours = (rows["grad_image"], rows["grad_text"], mean["grad_scale"], mean["grad_bias"])
    torch.testing.assert_close(mean["loss"], loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_info_nce_of_equal_features_is_log_batch() -> None:
    rows = torch.nn.functional.normalize(torch.ones(512, 16), dim=1)
    loss = info_nce(rows, rows, torch.tensor(1 / 0.07), Comm.solo())
    assert loss.item() == pytest.approx(math.log(512), abs=1e-5)


def test_info_nce_of_unrelated_features_is_near_log_batch() -> None:
    image, text = pairs(512, 1024)
    loss = info_nce(image, text, torch.tensor(1 / 0.07), Comm.solo())
    # The logits' variance 14.3^2 / 1024 = 0.2 adds half of itself to the log-partition.
    assert loss.item() == pytest.approx(math.log(512) + 0.1, abs=0.05)


def test_the_sigmoid_loss_of_orthogonal_features_at_its_start() -> None:
    """softplus(10) for the pair itself, softplus(-10) for each of the others."""
    batch = 64
    image = torch.eye(2 * batch)[:batch]
    text = torch.eye(2 * batch)[batch:]
    loss = sigmoid_loss(image, text, torch.tensor(10.0), torch.tensor(-10.0), Comm.solo())
    expected = math.log1p(math.exp(10)) + (batch - 1) * math.log1p(math.exp(-10))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_sigmoid_loss_is_exact_for_confident_pairs() -> None:
    """At large margins the loss is tiny, not zero and not negative."""
    image = torch.eye(4)
    loss = sigmoid_loss(image, image, torch.tensor(100.0), torch.tensor(-50.0), Comm.solo())
    assert loss.item() == pytest.approx(4 * math.exp(-50), rel=1e-4, abs=0)


class OneOf(Comm):
    """One rank of four, all of which hold the same rows."""

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat(4, 1)


def test_losses_hold_no_more_than_own_rows_by_all_columns() -> None:
    """Four ranks of 24 rows: 24 x 96 for InfoNCE, 24 x 24 at a time for the sigmoid loss."""
    comm = OneOf(rank=1, world_size=4, device=torch.device("cpu"))
    image, text = pairs(24, 3)
    scale, bias = torch.tensor(5.0).double(), torch.tensor(-2.0).double()
    contrast = largest_intermediate(lambda: info_nce(image, text, scale, comm).backward())
    assert contrast == 24 * 96
    with patch.object(sigmoid, "BLOCK_PAIRS", 24 * 24):
        largest = largest_intermediate(
            lambda: sigmoid_loss(image, text, scale, bias, comm).backward()
        )
        saved = saved_elements(lambda: sigmoid_loss(image, text, scale, bias, comm))
    assert largest == 24 * 24
    assert saved < 24 * 24 * 4


@pytest.mark.parametrize("pairs_at_once", [1, 24 * 7, 24 * 25, 1 << 20])
def test_blocks_of_pairs_do_not_change_the_sigmoid_loss(pairs_at_once: int) -> None:
    """Blocks that end in the middle of a rank's texts, of which this rank's are the third."""
    comm = OneOf(rank=2, world_size=4, device=torch.device("cpu"))
    image, text = pairs(24, 3)
    scale, bias = torch.tensor(5.0).double(), torch.tensor(-2.0).double()

    def found() -> list[torch.Tensor]:
        leaf = image.detach().requires_grad_()
        loss = sigmoid_loss(leaf, text, scale, bias, comm)
        return [loss, *torch.autograd.grad(loss, leaf)]

    whole = found()
    with patch.object(sigmoid, "BLOCK_PAIRS", pairs_at_once):
        torch.testing.assert_close(found(), whole, rtol=1e-12, atol=1e-14)
