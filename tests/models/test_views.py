"""Views of an image through a tower: one pass, and what each would give alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.models.views import encode_views
from trainer.types import Batch


class Tower(nn.Module):
    """Something that depends on every pixel, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[int] = []
        self.inner = nn.Linear(3 * 8 * 8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        self.passes.append(len(pixels))
        found: Tensor = self.inner(pixels.flatten(1)).tanh()
        return found


def batch_of(further: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=draw)
    views = torch.rand(4, further, 3, 8, 8, generator=draw) if further else None
    return Batch(images, None, None, torch.arange(4), views=views)


def test_views_go_through_the_tower_in_one_pass_as_if_each_went_alone() -> None:
    torch.manual_seed(0)
    tower, batch = Tower(), batch_of(2)
    found = encode_views(tower, batch)
    assert tower.passes == [12]
    assert batch.images is not None
    assert batch.views is not None
    alone = [tower(view) for view in (batch.images, *batch.views.unbind(1))]
    torch.testing.assert_close(found, torch.stack(alone, dim=1))


def test_without_further_views_there_is_a_row_for_each_image() -> None:
    tower, batch = Tower(), batch_of(0)
    assert batch.images is not None
    assert torch.equal(encode_views(tower, batch)[:, 0], tower(batch.images))
