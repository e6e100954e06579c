"""Several views of each image through a tower, in one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.types import Batch


def encode_views(
    tower: Callable[[Tensor], Tensor], batch: Batch
) -> Float[Tensor, "batch count dim"]:
    """What the tower says of each view: `torch.stack([tower(view) for view in views], dim=1)`.

    One pass, because ZeRO-3 gathers a block once between two steps. Without further views the
    result has one row for each image.
    """
    assert batch.images is not None
    views = batch.images[:, None]
    if batch.views is not None:
        views = torch.cat([views, batch.views], dim=1)
    encoded: Tensor = tower(views.flatten(0, 1)).unflatten(0, views.shape[:2])
    return encoded
