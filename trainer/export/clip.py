"""The same weights as transformers' CLIP classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from trainer.models.image_tower import ImageTower
from trainer.models.patch_tower import PatchTower
from trainer.models.two_tower import TwoTower


def clip_model(model: TwoTower, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Equal embeddings for equal pixels and tokens, and equal logits but for a bias.

    A learned bias has no place among CLIPModel's weights; it stands in its configuration as
    `logit_bias`, beside `match_probability`, which says how to use it.
    """
    log_scale = math.log(model.logit_scale().detach().item())
    sigmoid: dict[str, Any] = {}
    if model.logit_bias is not None:
        sigmoid = {
            "logit_bias": model.logit_bias().detach().item(),
            "match_probability": "sigmoid(logits_per_image + logit_bias)",
        }
    settings = CLIPConfig(
        text_config=model.text.backbone.config.to_dict() | _special_tokens(tokenizer),
        vision_config=model.image.backbone.config.to_dict(),
        projection_dim=model.config.embed_dim,
        logit_scale_init_value=log_scale,
        **sigmoid,
    )
    clip: CLIPModel = CLIPModel(settings)
    weights = {"logit_scale": torch.tensor(log_scale)}
    for ours, theirs in (("image", "vision"), ("text", "text")):
        tower = model.get_submodule(ours)
        backbone = tower.get_submodule("backbone").state_dict()
        weights |= {f"{theirs}_model.{name}": value for name, value in backbone.items()}
    weights["visual_projection.weight"] = model.image.projection.weight
    weights["text_projection.weight"] = model.text.projection.weight
    clip.load_state_dict(weights)
    clip.eval()
    return clip


def clip_vision_model(model: ImageTower) -> CLIPVisionModelWithProjection:
    """An image tower alone; `CLIPVisionModel` loads what it saves too."""
    clip: CLIPVisionModelWithProjection = CLIPVisionModelWithProjection(model.image.backbone.config)
    backbone = model.image.get_submodule("backbone").state_dict()
    weights = {f"vision_model.{name}": value for name, value in backbone.items()}
    clip.load_state_dict(weights | {"visual_projection.weight": model.image.projection.weight})
    clip.eval()
    return clip


def clip_vision_tower(model: PatchTower) -> CLIPVisionModel:
    """The tower whose patches are read, with the last norm that we leave out."""
    tower: CLIPVisionModel = CLIPVisionModel(model.image.backbone.config)
    tower.load_state_dict({**tower.state_dict(), **model.image.backbone.state_dict()})
    return tower


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
