"""Two towers whose image side says more of several views: SimCLR's rows and BYOL's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from trainer.comm import Comm
from trainer.errors import ConfigError
from trainer.models.batch_norm import batch_statistics
from trainer.models.config import HeadConfig, TwoTowerConfig
from trainer.models.head import ProjectionHead
from trainer.models.token_selection import all_kept, asks_for_scores, scored
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower, build_two_tower, seeded
from trainer.models.views import encode_views
from trainer.types import Batch, Features, TowerName


class SelfSupervisedHeads(NamedTuple):
    """What is built; a head that is None is left out."""

    simclr: HeadConfig | None = None
    byol: HeadConfig | None = None
    """Of the projector; the predictor is of the same sizes."""


class SelfSupervisedTowers(TwoTower):
    """In training, rows for every view; in an evaluation, the two towers."""

    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        image: Tower,
        text: Tower,
        image_head: ProjectionHead | None = None,
        text_head: ProjectionHead | None = None,
    ) -> None:
        super().__init__(config, image=image, text=text, image_head=image_head, text_head=text_head)
        self.simclr_head: ProjectionHead | None = None
        self.byol_projector: ProjectionHead | None = None
        self.byol_predictor: ProjectionHead | None = None

    def forward(self, batch: Batch) -> Features:
        """Beside the first view's `image`, and what its head makes of that: `further` [batch,
        views - 1, dim], `simclr` and `byol` [batch, views, dim], as unit vectors in float32. Their
        heads read what the projection reads.

        Of a cover alone: its patches' scores, and `byol_target` [batch, dim].
        """
        if asks_for_scores(batch):
            return self._of_cover(batch)
        if not self.training:
            return super().forward(batch)
        pooled = encode_views(
            lambda views: self.image(views, kept=all_kept(batch), wanted="pooled"), batch
        )
        rows = {"byol": self._predicted(pooled), "simclr": self._found(pooled)}
        raw = self.image.projection(pooled)
        embedded = _unit(raw)
        rows["further"] = embedded[:, 1:] if embedded.shape[1] > 1 else None
        more = {name: value for name, value in rows.items() if value is not None}
        texts = super().forward(batch._replace(images=None, cover=None))
        projected = None if self.image_head is None else _unit(self.image_head(raw[:, 0]))
        return texts._replace(image=embedded[:, 0], image_projected=projected, more=more or None)

    def _of_cover(self, batch: Batch) -> Features:
        features, pooled = scored(self.image, batch)
        if self.byol_projector is None:
            return features
        with batch_statistics(self.byol_projector):
            target = _unit(self.byol_projector(pooled))
        return features._replace(more={**(features.more or {}), "byol_target": target})

    def _predicted(self, pooled: Tensor) -> Tensor | None:
        if self.byol_projector is None or self.byol_predictor is None:
            return None
        flat = self.byol_predictor(self.byol_projector(pooled.flatten(0, 1)))
        return _unit(flat).view(*pooled.shape[:2], -1)

    def _found(self, pooled: Tensor) -> Tensor | None:
        if self.simclr_head is None:
            return None
        return _unit(self.simclr_head(pooled.flatten(0, 1))).view(*pooled.shape[:2], -1)

    def parameter_depth(self, name: str) -> tuple[TowerName, int]:
        """The heads learn as the image tower's projection does, and decay as it does."""
        if name.startswith(("simclr_head.", "byol_")):
            return "image", 0
        return super().parameter_depth(name)


def build_towers_of_views(
    config: TwoTowerConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    comm: Comm,
    *,
    heads: SelfSupervisedHeads,
    views: int,
    seed: int = 0,
) -> TwoTower:
    """The towers of `config` as `build_two_tower` makes them, with what further views and their
    heads need, if there are any; equal on all ranks."""
    towers = build_two_tower(config, tokenizer, comm, seed=seed)
    if views == 1 and heads == SelfSupervisedHeads():
        return towers
    model = SelfSupervisedTowers(
        config,
        image=towers.image,
        text=towers.text,
        image_head=towers.image_head,
        text_head=towers.text_head,
    )
    width = _pooled_width(model, config.image_size)
    if heads.simclr is not None:
        with seeded(seed, "simclr"):
            model.simclr_head = ProjectionHead(heads.simclr, input_dim=width, comm=comm)
    if heads.byol is not None:
        for name, reads in (("byol_projector", width), ("byol_predictor", heads.byol.dim)):
            with seeded(seed, name):
                head = ProjectionHead(heads.byol, input_dim=reads, comm=comm, bias=False)
                setattr(model, name, head)
    return model


def freeze_patch_projection(model: TwoTower) -> None:
    """Keep the first layer as it is drawn, which steadies training (MoCo v3, arXiv 2104.02057)."""
    backbone = model.image.backbone
    found = [layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d)]
    if len(found) != 1:
        raise ConfigError(
            f"{type(backbone).__name__} has {len(found)} convolutions, not the one that cuts "
            "patches; set frozen_patches=false"
        )
    found[0].requires_grad_(False)


@torch.no_grad()
def _pooled_width(model: TwoTower, image_size: int) -> int:
    weight = next(model.image.backbone.parameters())
    pixels = weight.new_zeros(1, 3, image_size, image_size)
    return int(model.image.pooled(pixels).shape[1])


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows.float(), dim=-1)
