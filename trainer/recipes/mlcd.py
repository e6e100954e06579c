"""An image tower alone, trained against prototypes that it learns (MLCD, arXiv 2407.17331).

    log(1 + sum_k e^(-s phi_k)) + log(1 + sum_j e^(s c_j))

over a sample's clusters k and drawn others j, of cosines c and phi = c - margin. `mlc` is the
paper's baseline and `slots` the mean of one cross-entropy for each label, with shared negatives.
The positive term vanishes at a cosine of about 0.4 and the negative term hardly falls, so the loss
stays large while the features get better; both are logged apart. `partial_fc`, `unicom` and `rice`
are recipes of their own; run files that spell them with `name: mlcd` go on as they are.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.parts.prototypes import PrototypesConfig, PrototypesTerm
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(SelectsTokens, RecipeConfig, PrototypesConfig):
    """Defaults are MLCD's. Where the model has a head, its output is compared."""

    name: Literal["mlcd"] = "mlcd"
    model: ImageTowerConfig = ImageTowerConfig()
    reads = frozenset({"head"})


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
        self.labels, self.head = self.term.labels, self.term.head
        self.parts: dict[str, Part] = {
            "head": self.head,
            **token_parts(config, context, self.model),
        }

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        return self.term.losses(features, batch, step)
