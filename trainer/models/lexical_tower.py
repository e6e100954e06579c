"""Images and texts as vectors over the words of a language model (LexVLA, section 3).

A text is what the language model would say next behind a prompt that asks for its important words.
An image says a word as loudly as the patch that says it loudest.
"""

from __future__ import annotations

from math import isqrt
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention
from transformers import CLIPVisionModel

from trainer.config import Frozen, PositiveInt
from trainer.kernels.patch_maximum import elu1p, patch_maximum
from trainer.losses.lexical import largest_sparse, threshold_sparse
from trainer.losses.units import at_least_float32
from trainer.models.patches import reading_only
from trainer.models.pooling import real_tokens_first
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower
from trainer.types import Batch, Features

Sparse = Literal["none", "threshold"] | PositiveInt


class AdapterConfig(Frozen):
    """From the states of an image encoder to the width of the words. The defaults come nearest to
    the published 17.1 million parameters behind DINOv2-B."""

    heads: PositiveInt = 12
    """Of the attention layer; the encoder's width is divisible by it."""
    hidden: PositiveInt | None = None
    """Of the first MLP; four times the encoder's width where None."""
    out_hidden: PositiveInt = 2048
    """Of the second MLP, which ends at the width of the words."""


class StateEncoder(Tower):
    """An image encoder of which every state counts: the class token's and the patches'."""

    def images(
        self, pixels: Float[Tensor, "n 3 s s"], kept: Int64[Tensor, "n kept"] | None = None
    ) -> Float[Tensor, "n states width"]:
        with (
            torch.set_grad_enabled(self.trained and torch.is_grad_enabled()),
            reading_only(self.backbone, kept, image_size=pixels.shape[-1]),
        ):
            states: Tensor = self.backbone(pixel_values=pixels).last_hidden_state
        return states.flatten(2).mT if states.dim() == 4 else states


class Adapter(nn.Module):
    """One attention layer and two MLPs, each behind a norm; the second ends at another width."""

    def __init__(self, config: AdapterConfig, *, width: int, dim: int) -> None:
        super().__init__()
        hidden = config.hidden or 4 * width
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm_words = nn.LayerNorm(width)
        self.words_in = nn.Linear(width, config.out_hidden)
        self.words_out = nn.Linear(config.out_hidden, dim)

    def forward(self, states: Float[Tensor, "n states width"]) -> Float[Tensor, "n states dim"]:
        n, count, width = states.shape
        parts = self.queries_keys_values(self.norm_attention(states))
        heads = parts.view(n, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(*heads.unbind(0))
        states = states + self.out(attended.transpose(1, 2).reshape(n, count, width))
        states = states + self.mlp_out(gelu(self.mlp_in(self.norm_mlp(states))))
        return self.words_out(gelu(self.words_in(self.norm_words(states))))  # type: ignore[no-any-return]


class Codebook(nn.Module):
    """A row for each word; a module of its own, so that ZeRO-3 gathers it where it is used."""

    def __init__(self, rows: Float[Tensor, "words dim"], *, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.clone(), requires_grad=trained)

    def forward(
        self, states: Float[Tensor, "n dim"] | Float[Tensor, "n states dim"]
    ) -> Float[Tensor, "n words"]:
        """How loudly each word is said; of several states the loudest. In float32 or better."""
        if states.dim() == 3:
            return patch_maximum(states, self.weight, activated=True)
        return elu1p(at_least_float32(states @ self.weight.T))


class LexicalTowers(TwoTower):
    """Two encoders into one vocabulary. In evaluation mode small coordinates are dropped."""

    why_not_exported = "its vectors stand over the words of a language model"
    adapter: Adapter
    image_words: Codebook
    text_words: Codebook
    word_ids: Int64[Tensor, " words"]
    """The token of each coordinate."""
    sparse: Sparse = "threshold"
    class_token: bool = True
    """Whether states that stand for no patch, such as the class token's, say words too."""

    def forward(self, batch: Batch) -> Features:
        image = None if batch.images is None else self.image_words(self.patches(batch.images))
        text = None
        if batch.tokens is not None:
            mask = batch.token_mask
            mask = torch.ones_like(batch.tokens, dtype=torch.bool) if mask is None else mask
            # What is said last, and at which place each token stands, depends on no filling.
            text = self.text_words(self.text(*real_tokens_first(batch.tokens, mask)))
        return Features(
            image=None if image is None else self.kept(normalize(image, dim=-1)),
            text=None if text is None else self.kept(normalize(text, dim=-1)),
            logit_scale=self.logit_scale(),
        )

    def patches(self, images: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n states dim"]:
        """What each state says, in the space of the words' rows."""
        states: Tensor = self.adapter(self.image(images))
        if self.class_token:
            return states
        return states[:, states.shape[1] - self.patches_a_side(states.shape[1]) ** 2 :]

    def patches_a_side(self, num_states: int) -> int:
        """Of the square that the last of so many states stand for; before them stand a class token
        and the like. Of an encoder that joins patches on its way: of the largest square."""
        patch = getattr(self.image.backbone.config, "patch_size", None)
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        side = self.config.image_size // patch if patch else 0
        return side if 0 < side * side <= num_states else isqrt(num_states)

    def kept(self, rows: Float[Tensor, "n words"]) -> Float[Tensor, "n words"]:
        """The coordinates that count; all of them in training."""
        if self.training or self.sparse == "none":
            return rows
        if self.sparse == "threshold":
            return threshold_sparse(rows)
        return largest_sparse(rows, self.sparse)


def states_width(encoder: StateEncoder) -> int:
    """How many numbers a state has; the last stage's, of an encoder that has several."""
    settings = encoder.backbone.config
    several = getattr(settings, "hidden_sizes", None)
    return int(several[-1] if several else settings.hidden_size)


def state_encoder(plain: Tower) -> StateEncoder:
    """The encoder of `plain` without pooling, projection and, of a CLIP model, the norm that its
    class token alone would pass through."""
    if isinstance(plain.backbone, CLIPVisionModel):
        setattr(plain.backbone, "post_layernorm", nn.Identity())  # noqa: B010 (its type is LayerNorm)
    return StateEncoder(
        plain.backbone, nn.Identity(), pool=plain.pool, trained=plain.trained, note=plain.note
    )
