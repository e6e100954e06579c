"""Cross-entropy over sampled classes of one label a sample (Partial FC, arXiv 2203.15565).

    -log(e^(s phi_y) / (e^(s phi_y) + sum_j e^(s c_j)))

over the drawn classes j and those of the batch's other samples, of cosines c; phi is the own one
after a margin (CosFace or ArcFace). `ceiling` is the inter-class filter.
"""

from __future__ import annotations

from typing import Literal

from trainer.parts.image_prototypes import ImagePrototypes as Recipe
from trainer.parts.image_prototypes import ImagePrototypesConfig, build_model

__all__ = ["Config", "Recipe", "build_model"]


class Config(ImagePrototypesConfig):
    name: Literal["partial_fc"] = "partial_fc"
    loss: Literal["pfc_ce"] = "pfc_ce"
    drop_unlabelled: Literal[False] = False
    """Has no meaning here: a sample without a label has no cross-entropy."""
    negatives: Literal["shared"] = "shared"
    """A sample has one label, so there is one draw."""
