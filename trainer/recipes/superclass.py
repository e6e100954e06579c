"""SuperClass: an image tower that learns the tokens of captions as classes (arXiv 2411.03313).

    L = mean_i -sum_c y_ic log softmax(s cos(I_i, W))_c

W has a row for each token of the vocabulary; y_i are the tokens of caption i, weighted by how rare
they are and summing to one. There is no text tower, and no batch of negatives: the loss of a sample
does not depend on the others, except by the counts of tokens.
"""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig, WordsConfig
from trainer.models.image_tower import ImageTower, ImageTowerConfig, build_image_tower
from trainer.parts.caption_tokens import TokenClassesConfig, TokenClassesTerm
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(SelectsTokens, RecipeConfig, TokenClassesConfig):
    name: Literal["superclass"] = "superclass"
    model: ImageTowerConfig = ImageTowerConfig()
    captions: WordsConfig = WordsConfig()
    """How captions are cut into tokens."""

    def words(self) -> WordsConfig:
        return self.captions


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
        dim = config.model.embed_dim
        self.term = TokenClassesTerm(config, context, context.tokenizer, dim=dim)
        self.parts: dict[str, Part] = {
            **self.term.parts,
            **token_parts(config, context, self.model),
        }

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        return Losses.of(words=self.term.loss(features.tensor("image"), batch, step))
