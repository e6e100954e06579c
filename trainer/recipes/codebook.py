"""TL;DR's captioner: captions written of an image's codes (arXiv 2305.20087).

    L = -log p(T | e(I)) / tokens + w_z mean |z - sg(e)|^2 + w_e mean |sg(z) - e|^2 + w_u untold

z are an image's patches, e the nearest of K codes to each, which a decoder reads in their place; it
is as sure of a caption as its codes let it be. Which codes an image has says what it shows: bags of
them are clustered, and the decoder's captions stand beside those of the shards.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.config import RecipeConfig, WordsConfig
from trainer.errors import ConfigError
from trainer.losses.codes import Choice, share_used, untold
from trainer.models.code_tower import CodebookConfig, CodeTower, DecoderConfig, build_code_tower
from trainer.models.image_tower import ImageTowerConfig
from trainer.recipe import Context, Part, WithoutPhases
from trainer.types import Batch, Features, Losses


class Config(RecipeConfig):
    """Defaults are the paper's, but for the sizes of the decoder."""

    name: Literal["codebook"] = "codebook"
    model: ImageTowerConfig = ImageTowerConfig()
    captions: WordsConfig = WordsConfig()
    """How captions are cut into tokens."""
    codes: CodebookConfig = CodebookConfig()
    decoder: DecoderConfig = DecoderConfig()
    commitment_weight: float = Field(default=1.0, ge=0)
    """w_z, which moves patches to their codes."""
    codebook_weight: float = Field(default=1.0, gt=0)
    """w_e, which moves codes to their patches; the published code has 0.25 here."""

    untold_weight: float = Field(default=0.1, ge=0)
    """Of ln K minus the information that a code has on its patch, in nats: without it few of the
    codes are used. The paper, which has no such term, starts its codes at words instead."""

    @model_validator(mode="after")
    def _no_temperature_for_nothing(self) -> Config:
        if not self.untold_weight and "temperature" in self.codes.model_fields_set:
            raise ValueError("untold_weight is 0, so nothing reads codes.temperature; drop it")
        return self

    def words(self) -> WordsConfig:
        return self.captions


def build_model(
    config: Config,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> CodeTower:
    if tokenizer is None:
        raise ConfigError("a model that writes captions needs a tokenizer")
    return build_code_tower(
        *(config.model, tokenizer),
        codes=config.codes,
        decoder=config.decoder,
        length=config.captions.length,
        seed=seed,
    )


class Recipe(WithoutPhases):
    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.comm = config, context.comm
        self.model = build_model(config, context.tokenizer, context.comm, seed=context.seed)
        self.parts: dict[str, Part] = {}

    def losses(self, features: Features, batch: Batch, step: int) -> Losses:
        """Every token of all ranks' batch counts the same."""
        assert batch.token_mask is not None, "the data gave no captions"
        tokens = self.comm.sum(batch.token_mask[:, 1:].sum().float()) / self.comm.world_size
        caption = features.tensor("nats").sum() / tokens
        untold_nats = untold(Choice(features.tensor("use"), features.tensor("doubt")), self.comm)
        used = share_used(features.tensor("codes"), self.config.codes.count, self.comm)
        means = {name: features.tensor(name).mean() for name in ("commitment", "codebook")}
        losses = Losses.of(caption=caption)
        for name, value in (means | {"untold": untold_nats}).items():
            losses = losses.with_term(name, value, getattr(self.config, f"{name}_weight"))
        return losses.with_term("codes_used", used, 0.0)
