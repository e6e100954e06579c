"""An image tower whose several views of an image are compared, with each other or with rows."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from trainer.comm import Comm
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.models.views import encode_views
from trainer.types import Batch, Features


class ViewsTower(ImageTower):
    """An image tower that says what is compared of every view of a batch that has several."""

    def forward(self, batch: Batch) -> Features:
        if batch.views is None:
            return super().forward(batch)
        rows = encode_views(self.image, batch)
        compared = rows if self.image_head is None else self._projected(rows)
        image, views = normalize(rows[:, 0].float(), dim=1), normalize(compared.float(), dim=2)
        return Features(image=image, more={"views": views})

    def _projected(self, rows: Tensor) -> Tensor:
        assert self.image_head is not None
        said: Tensor = self.image_head(rows.flatten(0, 1))
        return said.view(*rows.shape[:2], -1)


def build_views_tower(
    config: ImageTowerConfig, comm: Comm | None = None, *, seed: int = 0
) -> ViewsTower:
    tower = build_image_tower(config, comm, seed=seed)
    return ViewsTower(config, image=tower.image, image_head=tower.image_head)


def compared_views(features: Features) -> Float[Tensor, "batch views dim"]:
    """What is compared of every view; of a batch without views, of the image."""
    if features.more is not None:
        return features.tensor("views")
    rows = features.image if features.image_projected is None else features.image_projected
    assert rows is not None
    return rows[:, None]
