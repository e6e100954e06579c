"""BYOL's loss: its bounds, and that its target is a constant."""

from __future__ import annotations

import torch
from torch.nn.functional import mse_loss, normalize

from trainer.losses.byol import byol_loss


def test_between_nothing_and_four_and_the_squared_distance_of_directions() -> None:
    draw = torch.Generator().manual_seed(1)
    target = normalize(torch.randn(7, 5, generator=draw).double(), dim=1)
    both = target[:, None].expand(-1, 2, -1)
    assert abs(float(byol_loss(both, target))) < 1e-12
    assert abs(float(byol_loss(-both, target)) - 4) < 1e-12
    predicted = normalize(torch.randn(7, 2, 5, generator=draw).double(), dim=2)
    value = byol_loss(predicted, target)
    torch.testing.assert_close(value, 5 * mse_loss(predicted, both))
    assert 0 < float(value) < 4


def test_no_gradient_reaches_the_target() -> None:
    target = normalize(torch.randn(3, 4), dim=1).requires_grad_()
    predicted = normalize(torch.randn(3, 2, 4), dim=2).requires_grad_()
    byol_loss(predicted, target).backward()
    assert target.grad is None
    assert predicted.grad is not None
    assert predicted.grad.abs().max() > 0
