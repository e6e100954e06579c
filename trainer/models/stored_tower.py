"""A tower that reads stored features in place of pixels: the encoder has run before."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.config import StoredConfig
from trainer.models.projection import new_projection
from trainer.models.tower import Tower


class StoredTower(Tower):
    """Layers on a stored vector, and the projection. What travels as images are vectors."""

    def images(  # type: ignore[override]
        self, pixels: Float[Tensor, "n stored"], kept: None = None
    ) -> Float[Tensor, "n dim"]:
        embeddings: Tensor = self.projection(self.pooled(pixels))
        return embeddings

    def pooled(  # type: ignore[override]
        self, pixels: Float[Tensor, "n stored"], kept: None = None
    ) -> Float[Tensor, "n width"]:
        weights = next(self.parameters(), pixels)
        states: Tensor = self.backbone(pixels.to(weights.dtype))
        return states

    def gradient_checkpointing(self, enabled: bool) -> None:
        """There is no block whose states would be worth it."""


def stored_tower(
    section: StoredConfig, embed_dim: int, *, projection: Literal["auto", "new", "none"]
) -> StoredTower:
    """`layers` x (Linear, GELU), behind a norm of their input, then the projection. Without layers
    and projection a feature is what it was."""
    if projection == "none" and section.output_dim != embed_dim:
        raise ConfigError(
            f"model.image: without a projection its features have {section.output_dim} numbers, "
            f"but embed_dim is {embed_dim}; set model.embed_dim={section.output_dim}, or drop "
            "model.image.projection"
        )
    dims = [section.dim, *[section.width] * section.layers]
    layers: list[nn.Module] = [nn.LayerNorm(section.dim)] if section.layers else []
    for before, after in pairwise(dims):
        layers += [nn.Linear(before, after), nn.GELU()]
    last = nn.Identity() if projection == "none" else new_projection(dims[-1], embed_dim)
    note = f"images: stored features of {section.dim} numbers; no encoder runs"
    return StoredTower(nn.Sequential(*layers), last, pool="own", trained=True, note=note)
