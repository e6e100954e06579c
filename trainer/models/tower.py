"""One encoder of the pair: a transformers backbone, pooled and projected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.exact import exact_buffers
from trainer.models.patches import (
    patches_per_side,
    reading_only,
    resized,
    watching_class_token,
)

Pool = Literal["clip", "own", "eos", "last", "mean", "cls"]
"""`clip` and `own`: what the model pools by itself, CLIP's or another's."""


class PairScales(NamedTuple):
    """What multiplies and shifts the cosines of a loaded pair."""

    scale: float
    bias: float | None


class Tower(nn.Module):
    """Backbone, pooling, projection. Of a frozen tower only the projection learns."""

    def __init__(
        self,
        backbone: Any,
        projection: nn.Module,
        *,
        pool: Pool,
        trained: bool,
        causal: bool = False,  # no mask is given
        eos_token_id: int | None = None,
        pair: PairScales | None = None,
        note: str = "",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection: Any = projection
        self.pool: Pool = pool
        self.trained = trained
        self.causal = causal
        self.eos_token_id = eos_token_id
        self.pair = pair
        self.note = note
        """What was found at loading, for people."""
        self.blocks, self.num_blocks = _blocks(backbone)
        if not trained:
            backbone.requires_grad_(False)
            backbone.eval()

    def train(self, mode: bool = True) -> Tower:
        super().train(mode)
        if not self.trained:
            self.backbone.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tower:
        with exact_buffers(self, persistent=False):
            super()._apply(fn, recurse)
        return self

    def images(
        self, pixels: Float[Tensor, "n 3 s s"], kept: Int[Tensor, "n kept"] | None = None
    ) -> Float[Tensor, "n dim"]:
        """Embeddings of images, not normalised, in the dtype of the weights.

        `kept` are the patches of each image that the blocks see; all of them where None.
        """
        embeddings: Tensor = self.projection(self.pooled(pixels, kept))
        return embeddings

    def pooled(
        self, pixels: Float[Tensor, "n 3 s s"], kept: Int[Tensor, "n kept"] | None = None
    ) -> Float[Tensor, "n width"]:
        """What the projection reads of images."""
        with (
            torch.set_grad_enabled(self.trained and torch.is_grad_enabled()),
            reading_only(self.backbone, kept, image_size=pixels.shape[-1]),
        ):
            output = self.backbone(pixel_values=pixels)
        return pooled_image(output, self.pool)

    @torch.no_grad()
    def attended(
        self, pixels: Float[Tensor, "n 3 s s"]
    ) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n patches"]]:
        """What the projection reads of images of any size, and how the class token attends to
        their patches, in the mean over layers and heads."""
        with watching_class_token(self.backbone) as seen:
            output = self.backbone(pixel_values=pixels, **resized(self.backbone, pixels))
        num_patches = patches_per_side(self.backbone, pixels.shape[-1]) ** 2
        return pooled_image(output, self.pool), seen.mean[:, -num_patches:]

    def texts(
        self, tokens: Int[Tensor, "n length"], mask: Bool[Tensor, "n length"]
    ) -> Float[Tensor, "n dim"]:
        """Embeddings of right-padded texts, not normalised, in the dtype of the weights."""
        # A causal model's real tokens don't see the padding on their right. Without a mask its
        # attention takes the fused causal path, and nothing asks the device what the mask holds.
        # SigLIP's sees the padding and was trained so, on rows of one length.
        attention_mask = None if self.causal else mask.long()
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            output = self.backbone(input_ids=tokens, attention_mask=attention_mask)
        if self.pool == "own":
            pooled = output.pooler_output
        else:
            pooled = self._pooled(output.last_hidden_state, tokens, mask)
        embeddings: Tensor = self.projection(pooled)
        return embeddings

    def forward(
        self,
        values: Tensor,
        mask: Bool[Tensor, "n length"] | None = None,
        *,
        kept: Int[Tensor, "n kept"] | None = None,
        wanted: Literal["embeddings", "pooled", "attended"] = "embeddings",
    ) -> Float[Tensor, "n ..."] | tuple[Float[Tensor, "n width"], Float[Tensor, "n patches"]]:
        """`texts` where there is a mask, else what is wanted of images."""
        if wanted == "attended":
            return self.attended(values)
        if wanted == "pooled":
            return self.pooled(values, kept)
        return self.images(values, kept) if mask is None else self.texts(values, mask)

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep the inputs of the blocks only, and compute the rest again in the backward pass."""
        if not enabled:
            self.backbone.activation_checkpointing_disable()
            return
        try:
            self.backbone.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            kind = type(self.backbone).__name__
            raise ConfigError(
                f"{kind} can't be checkpointed; set gradient_checkpointing=false"
            ) from error

    def depth(self, name: str) -> int:
        """How many blocks are above a parameter of this tower; embeddings are below all."""
        if not name.startswith("backbone."):
            return 0
        inner = name.removeprefix("backbone.")
        if inner.startswith(self.blocks + "."):
            return self.num_blocks - 1 - int(inner[len(self.blocks) + 1 :].split(".")[0])
        return self.num_blocks if inner in self._below_blocks() else 0

    def _below_blocks(self) -> set[str]:
        """Parameters of the modules that were made before the blocks: the embeddings."""
        below = set()
        for name, _ in self.backbone.named_parameters():
            if name.startswith(self.blocks + "."):
                break
            below.add(name)
        return below

    def _pooled(self, states: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.pool == "cls":
            return states[:, 0]
        if self.pool == "mean":
            weights = mask.unsqueeze(2).float()
            total = (states.float() * weights).sum(dim=1)
            return (total / weights.sum(dim=1).clamp(min=1.0)).to(states.dtype)
        position = _last_true(mask)
        if self.pool == "eos":
            is_eos = (tokens == self.eos_token_id) & mask
            position = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), position)
        return states[torch.arange(states.shape[0], device=states.device), position]


def pooled_image(output: Any, pool: str) -> Float[Tensor, "n dim"]:
    """One vector of an image encoder's output: its own, the first state, or the mean of all."""
    if pool in ("clip", "own"):
        own: Tensor = output.pooler_output.flatten(1)
        return own
    return pooled_states(output.last_hidden_state, pool)


def pooled_states(states: Float[Tensor, "n ..."], pool: str) -> Float[Tensor, "n dim"]:
    """The first state, or the mean of all; of maps, whose channels come before places, too."""
    if states.dim() == 4:
        states = states.flatten(2).mT
    return states.mean(dim=1) if pool == "mean" else states[:, 0]


def _last_true(mask: Tensor) -> Tensor:
    """Column of the last True of each row; 0 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask * columns).amax(dim=1)


def _blocks(backbone: nn.Module) -> tuple[str, int]:
    """Name and length of the transformer's blocks: the longest of the outermost module lists."""
    lists = {
        name: len(module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    name = min(lists, key=lambda key: (key.count("."), -lists[key]), default="")
    return name, lists.get(name, 0)
