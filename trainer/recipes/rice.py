"""MLCD's loss with one cluster a sample: RICE's object loss (arXiv 2507.20025), of whole images.

    log(1 + e^(-s phi_y)) + log(1 + sum_j e^(s c_j))

of cosines c with drawn clusters j, and phi = c_y - margin. Regions of an image are not cut out.
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
    name: Literal["rice"] = "rice"
    model: ImageTowerConfig = ImageTowerConfig()
    reads = frozenset({"head"})
    loss: Literal["mlcd"] = "mlcd"
    labels_per_sample: Literal[1] = 1


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
