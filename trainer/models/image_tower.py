"""An image encoder alone: what is trained on labels, clusters or prototypes without any text."""

from __future__ import annotations

from trainer.comm import Comm
from trainer.errors import DataError
from trainer.models.config import ImageTowerConfig
from trainer.models.head import ProjectionHead
from trainer.models.load import image_tower
from trainer.models.model import Model
from trainer.models.token_selection import asks_for_scores, first_kept, scored
from trainer.models.tower import Tower
from trainer.models.two_tower import projection_head, seeded, unit
from trainer.types import Batch, Features, TowerName

__all__ = ["ImageTower", "ImageTowerConfig", "build_image_tower"]


class ImageTower(Model):
    """Images to unit vectors; parameters have the names they have in a two-tower model."""

    def __init__(
        self, config: ImageTowerConfig, *, image: Tower, image_head: ProjectionHead | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.image = image
        if config.image.stored is not None:
            self.why_not_exported = "it reads stored features and no images"
        self.image_head = image_head

    def forward(self, batch: Batch) -> Features:
        """`image`, and `image_projected` where there is a head, which reads it unnormalised. Of a
        batch that has a cover and nothing else, how its patches are attended to."""
        if asks_for_scores(batch):
            return scored(self.image, batch)[0]
        if batch.images is None:
            raise DataError("an image tower was given a batch without images")
        image = self.image(batch.images, kept=first_kept(batch))
        projected = None if self.image_head is None else self.image_head(image)
        return Features(image=unit(image), image_projected=unit(projected))

    def gradient_checkpointing(self, enabled: bool) -> None:
        if self.image.trained:
            self.image.gradient_checkpointing(enabled)

    def parameter_depth(self, name: str) -> tuple[TowerName, int]:
        """Depth 0 for the projection and the top block, the number of blocks for embeddings."""
        tower, _, inner = name.partition(".")
        return ("image", self.image.depth(inner)) if tower == "image" else ("other", 0)


def build_image_tower(
    config: ImageTowerConfig, comm: Comm | None = None, *, seed: int = 0
) -> ImageTower:
    """The model of `config`, initialised on the CPU; equal on all ranks.

    It starts from the weights that the image tower of a two-tower model of this seed has.
    """
    with seeded(seed, "image"):
        image = image_tower(config)
    return ImageTower(
        config, image=image, image_head=projection_head(config, comm or Comm.solo(), seed=seed)
    )
