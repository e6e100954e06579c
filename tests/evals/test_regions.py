"""Patch-level discrimination: a perfect model reaches the grid's ceiling, a blind one chance."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from trainer.evals.regions import majority_labels, mean_iou, named_patches, painted

SIDE, SIZE, CLASSES = 4, 32, 5


def masks(count: int = 60) -> torch.Tensor:
    """Discs of a class on a ground of another, over whose edges no grid runs."""
    draw = torch.Generator().manual_seed(1)
    place = torch.arange(SIZE)
    found = []
    for _ in range(count):
        inside, outside = torch.randperm(CLASSES, generator=draw)[:2].tolist()
        middle = torch.randint(8, 24, (2,), generator=draw)
        radius = int(torch.randint(5, 12, (1,), generator=draw))
        far = (place[:, None] - middle[0]) ** 2 + (place - middle[1]) ** 2
        found.append(torch.where(far < radius**2, inside, outside))
    return torch.stack(found)


def iou(labels: torch.Tensor, truth: torch.Tensor) -> float:
    return mean_iou(painted(labels, height=SIZE, width=SIZE), truth, num_classes=CLASSES)


def test_perfect_patches_reach_what_the_grid_can_and_drawn_ones_chance() -> None:
    truth = masks()
    best = majority_labels(truth, side=SIDE, num_classes=CLASSES)
    classes = normalize(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    assert torch.equal(named_patches(classes[best], classes), best)
    ceiling = iou(best, truth)
    assert 0.6 < ceiling < 1
    draw = torch.Generator().manual_seed(3)
    blind = iou(torch.randint(CLASSES, best.shape, generator=draw), truth)
    assert blind == pytest.approx(1 / (2 * CLASSES - 1), abs=0.04)
    order = torch.randperm(CLASSES, generator=draw)
    renamed = torch.empty_like(order).scatter_(0, order, torch.arange(CLASSES))
    again = named_patches(classes[best], classes[order])
    assert torch.equal(again, renamed[best])
    assert iou(again, renamed[truth]) == pytest.approx(ceiling)


def test_an_aligned_mask_has_a_ceiling_of_one_and_unknown_pixels_count_nowhere() -> None:
    truth = painted(torch.arange(16).view(1, 16) % CLASSES, height=SIZE, width=SIZE)
    best = majority_labels(truth, side=SIDE, num_classes=CLASSES)
    assert iou(best, truth) == 1.0
    holes = truth.clone()
    holes[:, ::3] = -1
    assert torch.equal(majority_labels(holes, side=SIDE, num_classes=CLASSES), best)
    wrong = best.clone()
    wrong[0, 0] = 3
    assert iou(best, holes) == 1.0 > iou(wrong, holes)


def test_by_hand() -> None:
    truth = torch.tensor([[[0, 0], [1, 1]]])
    found = torch.tensor([[[0, 1], [1, 1]]])
    assert mean_iou(found, truth, num_classes=3) == pytest.approx((1 / 2 + 2 / 3) / 2)
