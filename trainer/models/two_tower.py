"""Two encoders into one space, with ProtoCLIP's projection heads where a recipe has prototypes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.errors import ConfigError
from trainer.hashing import key_of
from trainer.models.config import HeadConfig, ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.head import ProjectionHead
from trainer.models.load import image_tower, text_tower
from trainer.models.model import Model
from trainer.models.scales import LearnedBias, LearnedScale
from trainer.models.token_selection import asks_for_scores, first_kept, scored
from trainer.models.tower import PairScales, Tower
from trainer.types import Batch, Features, TowerName

__all__ = ["HeadConfig", "TowerConfig", "TwoTower", "TwoTowerConfig", "build_two_tower"]


_BIAS = -10.0
"""SigLIP's, arXiv 2303.15343."""


class TwoTower(Model):
    """Images and texts to unit vectors, with the temperatures that multiply their cosines."""

    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        image: Tower,
        text: Tower,
        image_head: ProjectionHead | None = None,
        text_head: ProjectionHead | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.image = image
        self.text = text
        self.image_head = image_head
        self.text_head = text_head
        largest = config.scale_max
        scale, bias = first_scales(config, image.pair)
        self.logit_scale = LearnedScale(scale, largest=largest)
        self.logit_bias = LearnedBias(bias) if config.bias else None
        self.prototype_scale = (
            LearnedScale(config.prototype_scale_init, largest=largest) if text_head else None
        )

    def forward(self, batch: Batch) -> Features:
        """Features of what the batch has: a missing modality is skipped and stays None.

        Rows are L2-normalised in float32. The heads read the towers' output unnormalised. Of a
        batch that has a cover and nothing else, how its patches are attended to.
        """
        if asks_for_scores(batch):
            return scored(self.image, batch)[0]
        image = None if batch.images is None else self.image(batch.images, kept=first_kept(batch))
        text = None if batch.tokens is None else self.text(batch.tokens, _mask(batch))
        return Features(
            image=unit(image),
            text=unit(text),
            image_projected=unit(_apply(self.image_head, image)),
            text_projected=unit(_apply(self.text_head, text)),
            logit_scale=self.logit_scale(),
            logit_bias=None if self.logit_bias is None else self.logit_bias(),
            prototype_scale=None if self.prototype_scale is None else self.prototype_scale(),
        )

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of a trained tower's blocks, and recompute the rest backward."""
        for tower in (self.image, self.text):
            if tower.trained:
                tower.gradient_checkpointing(enabled)

    def parameter_depth(self, name: str) -> tuple[TowerName, int]:
        """Tower of a parameter and the number of its blocks above it.

        Projections, final norms and top blocks have depth 0, embeddings the number of blocks.
        """
        tower, _, inner = name.partition(".")
        if tower == "image":
            return "image", self.image.depth(inner)
        if tower == "text":
            return "text", self.text.depth(inner)
        return "other", 0


def build_two_tower(
    config: TwoTowerConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm | None = None,
    *,
    seed: int = 0,
) -> TwoTower:
    """The model of `config`, initialised on the CPU; equal on all ranks.

    Every part draws from a generator of its own, keyed by the seed and the part's name, so the
    towers start from the same weights whether there are heads or not. ConfigError without a
    tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("a model with a text tower needs a tokenizer")
    with seeded(seed, "image"):
        image = image_tower(config)
    with seeded(seed, "text"):
        text = text_tower(config, tokenizer)
    image_head, text_head = (
        projection_head(config, comm or Comm.solo(), seed=seed) for _ in range(2)
    )
    return TwoTower(config, image=image, text=text, image_head=image_head, text_head=text_head)


def first_scales(config: TwoTowerConfig, pair: PairScales | None) -> tuple[float, float]:
    """Scale and bias at the start: the given ones, those of a whole pair that is loaded, or ours.

    ConfigError where the pair's scale is outside what a scale may be.
    """
    if pair is None or config.image.path != config.text.path:
        pair = PairScales(config.initial_logit_scale, None)
    scale, bias = config.logit_scale_init or pair.scale, config.logit_bias_init
    if not 1 <= scale <= config.scale_max * (1 + 1e-5):
        raise ConfigError(
            f"the logit scale starts at {scale:.4g}, outside [1, {config.scale_max:g}]; set "
            f"model.scale_max={math.ceil(scale)}, or model.logit_scale_init"
            if scale > 1
            else f"the logit scale starts at {scale:.4g}, below 1; set model.logit_scale_init"
        )
    if bias is None:
        bias = _BIAS if pair.bias is None else pair.bias
    return min(scale, config.scale_max), bias


def projection_head(config: ModelConfig, comm: Comm, *, seed: int) -> ProjectionHead | None:
    """The head that `config` asks for, if it does; equal for every modality."""
    if config.head is None:
        return None
    # One name for both modalities: ProtoCLIP's two heads start from the same weights.
    with seeded(seed, "head"):
        return ProjectionHead(config.head, input_dim=config.embed_dim, comm=comm)


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Within it, torch draws from a generator keyed by the seed and a part's name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, "model", name))
        yield


def _mask(batch: Batch) -> Tensor:
    assert batch.tokens is not None
    mask = batch.token_mask
    return torch.ones_like(batch.tokens, dtype=torch.bool) if mask is None else mask


def _apply(head: nn.Module | None, rows: Tensor | None) -> Tensor | None:
    return None if head is None or rows is None else head(rows)


def unit(rows: Float[Tensor, "n dim"] | None) -> Float[Tensor, "n dim"] | None:
    """L2-normalised rows in float32."""
    return None if rows is None else normalize(rows.float(), dim=-1)
