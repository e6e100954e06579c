"""The map behind a tower, into the space that images and texts share."""

from __future__ import annotations

from typing import cast

from torch import nn

from trainer.errors import ConfigError
from trainer.models.config import TowerConfig
from trainer.models.folder import Loaded


def new_projection(width: int | None, embed_dim: int) -> nn.Linear:
    """Into the shared space, with CLIP's initialisation."""
    assert width is not None
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def projection_of(
    section: TowerConfig, name: str, embed_dim: int, width: int, loaded: Loaded
) -> nn.Module:
    """The folder's own where it has one, which must fit; else as the section says."""
    own, wanted = loaded.projection, section.projection
    if wanted == "new" or (wanted == "auto" and own is None):
        return new_projection(width, embed_dim)
    gives = own.out_features if wanted == "auto" and isinstance(own, nn.Linear) else width
    if gives != embed_dim:
        what = "projection gives" if isinstance(own, nn.Linear) else "pooled state has"
        raise ConfigError(
            f"{section.path}: its {what} {gives} numbers, but embed_dim is {embed_dim}; set "
            f"model.embed_dim={gives}, or model.{name}.projection=new to train another"
        )
    return nn.Identity() if wanted == "none" else cast(nn.Module, own)
