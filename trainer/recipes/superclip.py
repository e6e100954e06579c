"""SuperCLIP: CLIP, and the tokens of its caption as classes of an image (arXiv 2512.14480).

    L = CLIP(I, T) + w mean_i -sum_c y_ic log softmax(s cos(I_i, W))_c

W has a row for each token of the vocabulary; y_i are the tokens of caption i, weighted by how rare
they are and summing to one. Targets of batch x vocabulary exist nowhere. It helps most where the
batch is small. With weight 0 it is CLIP.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig
from trainer.losses.contrastive import info_nce
from trainer.models.two_tower import TwoTower, TwoTowerConfig, build_two_tower
from trainer.parts.caption_tokens import TokenClassesConfig, TokenClassesTerm
from trainer.parts.token_selection import SelectsTokens, token_parts
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(SelectsTokens, RecipeConfig, TokenClassesConfig):
    name: Literal["superclip"] = "superclip"
    model: TwoTowerConfig = TwoTowerConfig()
    weight: float = Field(default=1.0, ge=0)
    """w; with 0 the term is computed and logged, and moves nothing."""


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    return build_two_tower(config.model, tokenizer, comm, seed=seed)


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.comm, self.weight = context.comm, config.weight
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        dim = config.model.embed_dim
        self.term = TokenClassesTerm(config, context, context.tokenizer, dim=dim)
        self.parts: dict[str, Part] = {
            **self.term.parts,
            **token_parts(config, context, self.model),
        }

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
        clip = info_nce(image, text, scale, self.comm)
        return Losses.of(clip=clip).with_term(
            "words", self.term.loss(image, batch, step), self.weight
        )
