"""A method that is an image tower and prototypes that it learns: all but its settings.

`partial_fc`, `unicom` and `rice` are this with settings of their own; `mlcd` also selects tokens.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.parts.prototypes import PrototypesConfig, PrototypesTerm
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class ImagePrototypesConfig(RecipeConfig, PrototypesConfig):
    """Where the model has a head, its output is compared."""

    model: ImageTowerConfig = ImageTowerConfig()
    reads = frozenset({"head"})


def build_model(
    config: ImagePrototypesConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> ImageTower:
    return build_image_tower(config.model, comm, seed=seed)


class ImagePrototypes(WithoutPhases):
    """The recipe of one term: a sample's labels among all prototypes."""

    def __init__(self, config: ImagePrototypesConfig, context: Context) -> None:
        self.model = build_model(config, context.text_tokenizer, context.comm, seed=context.seed)
        self.term = PrototypesTerm(config, context, dim=config.model.compared_dim)
        self.labels, self.head = self.term.labels, self.term.head
        self.parts: dict[str, Part] = {"head": self.head}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        return self.term.losses(features, batch, step)
