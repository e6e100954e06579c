"""An image encoder that is compared with a frozen teacher's texts: no text side at all."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionModel

from trainer.errors import ConfigError, DataError
from trainer.models.config import ImageTowerConfig
from trainer.models.load import image_tower
from trainer.models.model import Model
from trainer.models.patches import reading_only
from trainer.models.scales import LearnedBias, LearnedScale
from trainer.models.tower import Tower
from trainer.models.two_tower import seeded, unit
from trainer.types import Batch, Features, TowerName

SMALLEST_HIDDEN = 4096
"""FLAME's hidden width is that of the teacher, but no less than this."""


class PatchEncoder(Tower):
    """A vision transformer whose patches, not its class token, become the embedding."""

    def patches(
        self, pixels: Float[Tensor, "n 3 s s"], kept: Int[Tensor, "n kept"] | None = None
    ) -> Float[Tensor, "n patches dim"]:
        """Each patch projected, not normalised, in the dtype of the weights."""
        with (
            torch.set_grad_enabled(self.trained and torch.is_grad_enabled()),
            reading_only(self.backbone, kept, image_size=pixels.shape[-1]),
        ):
            states = self.backbone(pixel_values=pixels).last_hidden_state
        projected: Tensor = self.projection(states[:, 1:])
        return projected

    def images(
        self, pixels: Float[Tensor, "n 3 s s"], kept: Int[Tensor, "n kept"] | None = None
    ) -> Float[Tensor, "n dim"]:
        """The mean of the projected patches, not normalised, in the dtype of the weights."""
        # The projection ends in a norm, so its mean is not the projection of the mean.
        return self.patches(pixels, kept).mean(dim=1)


class PatchTower(Model):
    """Images to unit vectors in a teacher's space, with the scale and bias of their logits."""

    def __init__(
        self,
        config: ImageTowerConfig,
        *,
        image: PatchEncoder,
        logit_scale: float,
        scale_max: float,
        logit_bias: float | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.image = image
        self.logit_scale = LearnedScale(logit_scale, largest=scale_max)
        self.logit_bias = None if logit_bias is None else LearnedBias(logit_bias)

    def forward(self, batch: Batch) -> Features:
        """`image`, the scale, and the bias where there is one."""
        if batch.images is None:
            raise DataError(
                "this model reads images only; an evaluation with texts needs their vectors "
                "(text_store)"
            )
        return Features(
            image=unit(self.image(batch.images)),
            logit_scale=self.logit_scale(),
            logit_bias=None if self.logit_bias is None else self.logit_bias(),
        )

    def gradient_checkpointing(self, enabled: bool) -> None:
        if self.image.trained:
            self.image.gradient_checkpointing(enabled)

    def parameter_depth(self, name: str) -> tuple[TowerName, int]:
        """Depth 0 for the head and the top block, the number of blocks for embeddings."""
        tower, _, inner = name.partition(".")
        return ("image", self.image.depth(inner)) if tower == "image" else ("other", 0)


def build_patch_tower(
    config: ImageTowerConfig,
    *,
    hidden: int | None = None,
    logit_scale: float,
    scale_max: float = 100.0,
    logit_bias: float | None = None,
    seed: int = 0,
) -> PatchTower:
    """FLAME's model: the vision transformer of `config` and an MLP on each of its patches.

    The head is Linear, GELU, Linear, LayerNorm from the transformer's width to `embed_dim`, with
    `hidden` between (at least 4096 where None). The transformer's own last norm is not used, and
    not kept. Equal on all ranks. FLAME, arXiv 2411.11927.
    """
    found = patch_backbone(config, seed=seed)
    with seeded(seed, "patch head"):
        head = patch_head(found.backbone.config.hidden_size, config.embed_dim, hidden=hidden)
    image = PatchEncoder(found.backbone, head, pool="mean", trained=found.trained, note=found.note)
    return PatchTower(
        config, image=image, logit_scale=logit_scale, scale_max=scale_max, logit_bias=logit_bias
    )


class PatchBackbone(NamedTuple):
    """A vision transformer without its last norm and projection."""

    backbone: CLIPVisionModel
    trained: bool
    note: str
    """What was found at loading, for people."""


def patch_backbone(config: ImageTowerConfig, *, seed: int) -> PatchBackbone:
    """The vision transformer of `config`; ConfigError where its patches are not known."""
    began, section = time.perf_counter(), config.image
    with seeded(seed, "image"):
        plain = image_tower(_without_projection(config))
    backbone = plain.backbone
    if not isinstance(backbone, CLIPVisionModel):
        kind = type(backbone).__name__
        raise ConfigError(f"the patches of a {kind} are not known; use a preset or a CLIP model")
    if section.pooling not in ("auto", "mean"):
        raise ConfigError(f"image.pooling is {section.pooling}; patches are averaged")
    setattr(backbone, "post_layernorm", nn.Identity())  # noqa: B010 (its type is LayerNorm)
    note = "" if section.path is None else _note(section.path, time.perf_counter() - began)
    return PatchBackbone(backbone, plain.trained, note)


def _without_projection(config: ImageTowerConfig) -> ImageTowerConfig:
    """Patches have a head of their own, so what the folder projects its pooled state with, and
    into how many numbers, does not matter."""
    section = config.image
    if section.projection != "auto":
        raise ConfigError(
            f"image.projection is {section.projection}, but patches have a head of their own; "
            "drop it"
        )
    if section.path is None:
        return config
    return config.model_copy(update={"image": section.model_copy(update={"projection": "new"})})


def _note(path: str, seconds: float) -> str:
    return (
        f"image tower: the patches of CLIPVisionModel of {path}, a new head; loaded and looked at "
        f"in {seconds:.1f} s"
    )


def patch_head(width: int, dim: int, *, hidden: int | None) -> nn.Sequential:
    """The MLP that reads one patch."""
    middle = hidden or max(dim, SMALLEST_HIDDEN)
    return nn.Sequential(
        nn.Linear(width, middle), nn.GELU(), nn.Linear(middle, dim), nn.LayerNorm(dim)
    )
