"""Cross-entropy over sampled classes of one label a sample (Partial FC, arXiv 2203.15565).

    -log(e^(s phi_y) / (e^(s phi_y) + sum_j e^(s c_j)))

over the drawn classes j and those of the batch's other samples, of cosines c; phi is the own one
after a margin (CosFace or ArcFace). `ceiling` is the inter-class filter.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.parts.prototypes import PrototypesConfig, PrototypesTerm
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig, PrototypesConfig):
    name: Literal["partial_fc"] = "partial_fc"
    model: ImageTowerConfig = ImageTowerConfig()
    reads = frozenset({"head"})
    loss: Literal["pfc_ce"] = "pfc_ce"
    drop_unlabelled: Literal[False] = False
    """Has no meaning here: a sample without a label has no cross-entropy."""


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
