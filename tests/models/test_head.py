"""The projection head is the plain stack of layers that the paper describes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.comm import Comm
from trainer.models.config import HeadConfig
from trainer.models.head import ProjectionHead

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_equals_a_stack_of_torch_layers(layers: int, norm: str) -> None:
    inside = {"hidden": 10, "norm": norm} if layers else {}
    config = HeadConfig(layers=layers, dim=4, **inside)
    head = ProjectionHead(config, input_dim=7, comm=Comm.solo())
    plain: list[nn.Module] = []
    for index in range(layers):
        plain += [nn.Linear(7 if index == 0 else 10, 10), NORMS[norm](10), nn.ReLU()]
    stack = nn.Sequential(*plain, nn.Linear(10 if layers else 7, 4))
    with torch.no_grad():
        for target, source in zip(stack.parameters(), head.parameters(), strict=True):
            target.copy_(source)
    rows = torch.randn(9, 7)
    torch.testing.assert_close(head(rows), stack(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.eval()(rows), stack.eval()(rows), rtol=1e-5, atol=1e-6)
