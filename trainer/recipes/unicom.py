"""Partial FC in a random subspace of the features, drawn anew for each step (arXiv 2304.05884).

    -log(e^(s phi_y) / (e^(s phi_y) + sum_j e^(s c_j))),    phi = cos(angle + margin)

of cosines c between features and rows that were both cut to the same `features_kept` coordinates
before they were normalised; j are drawn classes and those of the batch's other samples.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import PositiveInt, RecipeConfig
from trainer.losses.margin import MarginKind
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.parts.prototypes import PrototypesConfig, PrototypesTerm
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig, PrototypesConfig):
    name: Literal["unicom"] = "unicom"
    model: ImageTowerConfig = ImageTowerConfig()
    reads = frozenset({"head"})
    loss: Literal["pfc_ce"] = "pfc_ce"
    drop_unlabelled: Literal[False] = False
    """Has no meaning here: a sample without a label has no cross-entropy."""
    margin: MarginKind = "angular"
    features_kept: PositiveInt
    """Coordinates that a step compares; which part of them the paper kept is not known."""


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> ImageTower:
    return build_image_tower(config.model, comm, seed=seed)


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.model = build_model(config, context.text_tokenizer, context.comm, seed=context.seed)
        self.term = PrototypesTerm(config, context, dim=config.model.compared_dim)
        self.parts: dict[str, Part] = {"head": self.term.head}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        return self.term.losses(features, batch, step)
