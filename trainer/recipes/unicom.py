"""Partial FC in a random subspace of the features, drawn anew for each step (arXiv 2304.05884).

    -log(e^(s phi_y) / (e^(s phi_y) + sum_j e^(s c_j))),    phi = cos(angle + margin)

of cosines c between features and rows that were both cut to the same `features_kept` coordinates
before they were normalised; j are drawn classes and those of the batch's other samples.
"""

from __future__ import annotations

from typing import Literal

from trainer.config import PositiveInt
from trainer.losses.margin import MarginKind
from trainer.parts.image_prototypes import ImagePrototypes as Recipe
from trainer.parts.image_prototypes import ImagePrototypesConfig, build_model

__all__ = ["Config", "Recipe", "build_model"]


class Config(ImagePrototypesConfig):
    name: Literal["unicom"] = "unicom"
    loss: Literal["pfc_ce"] = "pfc_ce"
    drop_unlabelled: Literal[False] = False
    """Has no meaning here: a sample without a label has no cross-entropy."""
    negatives: Literal["shared"] = "shared"
    """A sample has one label, so there is one draw."""
    margin: MarginKind = "angular"
    features_kept: PositiveInt
    """Coordinates that a step compares; which part of them the paper kept is not known."""
