"""The same weights as transformers' SiglipModel, for two towers that were loaded from SigLIP's."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
    SiglipVisionModel,
)

from trainer.models.two_tower import TwoTower


def is_siglip(model: TwoTower) -> bool:
    """Whether both towers are SigLIP's."""
    towers = model.image.backbone, model.text.backbone
    return isinstance(towers[0], SiglipVisionModel) and isinstance(towers[1], SiglipTextModel)


def why_not_siglip(model: TwoTower) -> str:
    """What SiglipModel has no place for; empty where it holds all of the model."""
    for name, tower in (("image", model.image), ("text", model.text)):
        if tower.pool != "own":
            return f"the {name} tower pools by {tower.pool} and not by its own head"
        if not isinstance(tower.projection, nn.Identity):
            return f"the {name} tower has a projection behind its head, which SigLIP has not"
    if model.logit_bias is None:
        return "it was trained with a softmax and no bias, and SiglipModel's answer is a sigmoid"
    return ""


def siglip_model(model: TwoTower, tokenizer: PreTrainedTokenizerFast) -> SiglipModel:
    """Equal embeddings for equal pixels and tokens, and equal logits, bias included.

    `SiglipModel.logits_per_image` is scale * cosine + bias; its sigmoid is the probability that
    the pair matches. Tokens are rows filled up to the text's length, without a mask.
    """
    assert model.logit_bias is not None
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = SiglipConfig(
        text_config=model.text.backbone.config.to_dict() | special,
        vision_config=model.image.backbone.config.to_dict(),
    )
    siglip: SiglipModel = SiglipModel(settings)
    weights = {
        "logit_scale": torch.tensor([math.log(model.logit_scale().detach().item())]),
        "logit_bias": torch.tensor([model.logit_bias().detach().item()]),
    }
    for ours, theirs in (("image", "vision_model"), ("text", "text_model")):
        backbone = model.get_submodule(ours).get_submodule("backbone").state_dict()
        weights |= {f"{theirs}.{name}": value for name, value in backbone.items()}
    siglip.load_state_dict(weights)
    siglip.eval()
    return siglip
