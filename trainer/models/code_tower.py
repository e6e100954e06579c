"""An image encoder whose patches are replaced by codes, and a decoder that writes of the codes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from trainer.config import Frozen, PositiveInt
from trainer.errors import DataError
from trainer.losses.codes import Choice, Quantised, quantise, soft_choice
from trainer.losses.units import at_least_float32
from trainer.models.config import ImageTowerConfig
from trainer.models.load import ATTENTION
from trainer.models.model import Model
from trainer.models.patch_tower import PatchEncoder, patch_backbone
from trainer.models.two_tower import seeded, unit
from trainer.types import Batch, Features, TowerName


class CodebookConfig(Frozen):
    """Vectors that stand for patches."""

    count: PositiveInt = 3000
    """K; the published code has 1024."""
    unit: bool = True
    """Patches and codes are compared as unit vectors; false: as they are, as published."""
    temperature: float = Field(default=0.1, gt=0)
    """Of soft choices among codes, which squared distances are divided by; `untold_weight` alone
    reads them."""


class DecoderConfig(Frozen):
    """The transformer that reads codes and writes a caption."""

    width: PositiveInt = 128
    """Numbers per token between blocks."""
    layers: PositiveInt = 2
    """Blocks of self-attention, attention to the codes, and an MLP of four times the width."""
    heads: PositiveInt = 4
    """Attention heads per block; a divisor of the width."""

    @model_validator(mode="after")
    def _whole_heads(self) -> DecoderConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self


class Codebook(nn.Module):
    """K rows, learnt like any weight; at the start uniform within 1 / K, as published."""

    def __init__(self, config: CodebookConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.rows = nn.Parameter(torch.empty(config.count, dim).uniform_(-1, 1) / config.count)

    def forward(self, states: Float[Tensor, "batch patches dim"]) -> tuple[Quantised, Choice]:
        """In float32 or better, whatever the states come in."""
        states, rows = at_least_float32(states), at_least_float32(self.rows)
        if self.config.unit:
            states, rows = normalize(states, dim=-1), normalize(rows, dim=-1)
        choice = soft_choice(states, rows, temperature=self.config.temperature)
        return quantise(states, rows), choice


class CodeEncoder(PatchEncoder):
    """A vision transformer whose patches become the codes that are nearest to them."""

    codebook: Codebook

    def quantised(self, pixels: Float[Tensor, "n 3 s s"]) -> tuple[Quantised, Choice]:
        found: tuple[Quantised, Choice] = self.codebook(self.patches(pixels))
        return found

    def images(
        self, pixels: Float[Tensor, "n 3 s s"], kept: Int[Tensor, "n kept"] | None = None
    ) -> Float[Tensor, "n dim"]:
        """The mean of an image's codes, not normalised."""
        codes, _ = self.codebook(self.patches(pixels, kept))
        mean: Tensor = codes.states.mean(dim=1)
        return mean


class CodeTower(Model):
    """Images to codes and their mean as a unit vector; captions to what they cost."""

    why_not_exported = "it says codes and captions, for which no exported form has a place"

    def __init__(
        self, config: ImageTowerConfig, *, image: CodeEncoder, bridge: nn.Module, decoder: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.image, self.bridge, self.decoder = image, bridge, decoder

    def forward(self, batch: Batch) -> Features:
        """`image`, and by name what `Quantised` and `Choice` say beside the states.

        Of a batch with captions also `nats` [batch]: what a caption costs in all, given its codes.
        """
        if batch.images is None:
            raise DataError("a model of codes was given a batch without images")
        found, choice = self.image.quantised(batch.images)
        more = found._asdict() | choice._asdict()
        states = more.pop("states")
        if batch.tokens is not None and batch.token_mask is not None:
            more["nats"] = self._nats(self.bridge(states), batch.tokens, batch.token_mask)
        return Features(image=unit(states.mean(dim=1)), more=more)

    def _nats(
        self,
        codes: Float[Tensor, "batch patches width"],
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, " batch"]:
        said = self.decoder(input_ids=tokens[:, :-1], encoder_hidden_states=codes, use_cache=False)
        nats = cross_entropy(said.logits.float().mT, tokens[:, 1:], reduction="none")
        return (nats * mask[:, 1:]).sum(dim=1)

    @torch.no_grad()
    def write(
        self, pixels: Float[Tensor, "n 3 s s"], *, begin: int, most_tokens: int, beams: int
    ) -> Int[Tensor, "n length"]:
        """Ids of a caption of each image, the same whenever they are asked for."""
        codes = self.bridge(self.image.quantised(pixels)[0].states)
        first = torch.full((len(pixels), 1), begin, device=pixels.device)
        ids: Tensor = self.decoder.generate(
            first,
            encoder_hidden_states=codes,
            max_new_tokens=most_tokens,
            num_beams=beams,
            do_sample=False,
            use_cache=False,
        )
        return ids

    def gradient_checkpointing(self, enabled: bool) -> None:
        if self.image.trained:
            self.image.gradient_checkpointing(enabled)
        if enabled:
            self.decoder.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.decoder.activation_checkpointing_disable()

    def parameter_depth(self, name: str) -> tuple[TowerName, int]:
        """The decoder's embeddings are below its blocks; codes and projections have depth 0."""
        tower, _, inner = name.partition(".")
        if tower == "image":
            return "image", self.image.depth(inner)
        if tower != "decoder":
            return "other", 0
        layers = self.decoder.config.num_hidden_layers
        if ".layer." in inner:
            return "text", layers - 1 - int(inner.split(".layer.")[1].split(".")[0])
        return "text", layers if ".embeddings." in inner else 0


def build_code_tower(
    config: ImageTowerConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    codes: CodebookConfig,
    decoder: DecoderConfig,
    length: int,
    seed: int = 0,
) -> CodeTower:
    """The vision transformer of `config`, a projection and norm of its patches, codes, and a
    decoder of captions of `length` tokens. Equal on all ranks."""
    found, dim = patch_backbone(config, seed=seed), config.embed_dim
    with seeded(seed, "patch head"):
        width = found.backbone.config.hidden_size
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim, bias=False))
    image = CodeEncoder(found.backbone, head, pool="mean", trained=found.trained, note=found.note)
    with seeded(seed, "codebook"):
        image.codebook = Codebook(codes, dim)
    with seeded(seed, "decoder"):
        bridge = nn.Linear(dim, decoder.width)
        writer = _decoder(decoder, tokenizer, length)
    return CodeTower(config, image=image, bridge=bridge, decoder=writer)


def _decoder(section: DecoderConfig, tokenizer: PreTrainedTokenizerFast, length: int) -> Any:
    settings = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=section.width,
        num_hidden_layers=section.layers,
        num_attention_heads=section.heads,
        intermediate_size=4 * section.width,
        max_position_embeddings=length,
        type_vocab_size=1,
        is_decoder=True,
        add_cross_attention=True,
        tie_word_embeddings=False,  # a row that two modules own is gathered for one of them
        hidden_dropout_prob=0.0,  # both passes of an accumulation must see the same
        attention_probs_dropout_prob=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoder: Any = BertLMHeadModel._from_config(settings, attn_implementation=ATTENTION)
    decoder.cls.predictions.bias = None  # the linear layer has the one that is read
    return decoder
