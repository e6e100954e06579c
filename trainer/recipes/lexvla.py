"""LexVLA: images and texts meet in the vocabulary of a language model (2410.14184).

    s = normalize(elu1p(z Z^T)), of an image the largest over its patches
    L = InfoNCE(image -> text) + InfoNCE(text -> image) + weights of overused words

The language model learns by low-rank additions, the image encoder stays frozen behind an adapter,
and images have a copy of the words' rows that learns. Beyond the paper, which has no code: the
penalty is of all ranks' batch, and the words are chosen by a stated rule.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import LocalPath, OnlyWhere, RecipeConfig
from trainer.data.prompted import with_template
from trainer.errors import ConfigError
from trainer.losses.contrastive import info_nce
from trainer.losses.usage import usage_penalty, warm_up
from trainer.models.config import TwoTowerConfig, lexical_sections
from trainer.models.lexical_tower import (
    Adapter,
    AdapterConfig,
    Codebook,
    LexicalTowers,
    Sparse,
    state_encoder,
    states_width,
)
from trainer.models.two_tower import build_two_tower, seeded
from trainer.models.words import beside_rows, chosen_words, output_rows
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses

PROMPT = (
    'The focus of "man riding a white horse" lies on important words: "man", "riding", "white", '
    '"horse". The focus of "{}" lies on important words:'
)


class Config(RecipeConfig):
    name: Literal["lexvla"] = "lexvla"
    model: Annotated[TwoTowerConfig, BeforeValidator(lexical_sections)]
    """`text.path` is a causal language model whose width is `embed_dim`."""
    vocabulary: Literal["words", "all"] | LocalPath = "words"
    """Which tokens are coordinates: those that are words, all, or the ids of a text file."""
    prompt: str = PROMPT
    """Around every text; `{}` is its place. What the language model would say next counts."""
    adapter: AdapterConfig = AdapterConfig()
    class_token: bool = True
    """Whether the class token says words too, besides the patches."""
    penalty: Literal["overuse", "flops", "none"] = "overuse"
    """Of words that are used by everything."""
    image_penalty: Annotated[float, OnlyWhere("penalty", "overuse", "flops"), Field(ge=0)] = 5e-4
    """Weight of the usage penalty of the images' words."""
    text_penalty: Annotated[float, OnlyWhere("penalty", "overuse", "flops"), Field(ge=0)] = 1e-3
    """Weight of the usage penalty of the texts' words."""
    penalty_steps: Annotated[int, OnlyWhere("penalty", "overuse", "flops"), Field(ge=0)] = 2000
    """Steps over which the weights of the penalty grow from 0, with the square of the step."""
    sparse: Sparse = "threshold"
    """Coordinates that count in evaluation: above 1 / sqrt(words), all (`none`), or the largest
    so many."""

    @model_validator(mode="after")
    def _a_language_model(self) -> Config:
        if self.model.text.path is None:
            raise ValueError(
                "lexvla says the words of a causal language model: set model.text.path to one"
            )
        return self

    def prompted(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        return with_template(tokenizer, self.prompt, length=self.model.text_length)


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> LexicalTowers:
    towers = build_two_tower(config.model, tokenizer, comm, seed=seed)
    assert tokenizer is not None
    assert config.model.text.path is not None
    image = state_encoder(towers.image)
    model = LexicalTowers(config.model, image=image, text=towers.text)
    rows = output_rows(config.model.text.path)
    model.text.note += beside_rows(config.model.text.path)
    model.word_ids = chosen_words(tokenizer, config.vocabulary, count=len(rows))
    rows = rows[model.word_ids].float()
    model.text_words, model.image_words = (
        Codebook(rows, trained=False),
        Codebook(rows, trained=True),
    )
    width = states_width(image)
    if width % config.adapter.heads:
        raise ConfigError(
            f"recipe.adapter.heads is {config.adapter.heads}, which does not divide the image "
            f"encoder's width of {width}"
        )
    with seeded(seed, "adapter"):
        model.adapter = Adapter(config.adapter, width=width, dim=rows.shape[1])
    model.sparse, model.class_token = config.sparse, config.class_token
    return model


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.comm = config, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = {}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """Section 3.3: the two directions are added, not averaged."""
        image, text, scale = map(features.tensor, ("image", "text", "logit_scale"))
        losses = Losses().with_term("contrastive", info_nce(image, text, scale, self.comm), 2.0)
        if self.config.penalty == "none":
            return losses
        growth = warm_up(step, self.config.penalty_steps)
        for side, rows, weight in (
            ("image", image, self.config.image_penalty),
            ("text", text, self.config.text_penalty),
        ):
            value = usage_penalty(rows, self.comm, kind=self.config.penalty)
            losses = losses.with_term(f"{side}_{self.config.penalty}", value, weight * growth)
        return losses
