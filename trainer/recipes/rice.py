"""MLCD's loss with one cluster a sample: RICE's object loss (arXiv 2507.20025), of whole images.

    log(1 + e^(-s phi_y)) + log(1 + sum_j e^(s c_j))

of cosines c with drawn clusters j, and phi = c_y - margin. Regions of an image are not cut out.
"""

from __future__ import annotations

from typing import Literal

from trainer.parts.image_prototypes import ImagePrototypes as Recipe
from trainer.parts.image_prototypes import ImagePrototypesConfig, build_model

__all__ = ["Config", "Recipe", "build_model"]


class Config(ImagePrototypesConfig):
    name: Literal["rice"] = "rice"
    loss: Literal["mlcd"] = "mlcd"
    labels_per_sample: Literal[1] = 1
    negatives: Literal["shared"] = "shared"
    """A sample has one label, so there is one draw."""
