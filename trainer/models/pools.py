"""How the states of a folder's model become a vector, as it is asked or as may be meant."""

from __future__ import annotations

from typing import Any, cast

from transformers import CLIPTextModel, CLIPVisionModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from trainer.errors import ConfigError
from trainer.models.config import TowerConfig
from trainer.models.folder import Loaded
from trainer.models.inspection import Reach, Sight
from trainer.models.sentence_folder import SentenceFolder
from trainer.models.tower import Pool


def image_pools(section: TowerConfig, loaded: Loaded, sight: Sight, path: str) -> list[Pool]:
    """What may be meant, the likeliest first."""
    kind = type(loaded.backbone).__name__
    if section.pooling == "cls" and not sight.has_class_token:
        raise ConfigError(
            f"image.pooling is cls, but {kind} of {path} has no class token; use auto or mean"
        )
    if isinstance(loaded.backbone, CLIPVisionModel) and section.pooling in ("auto", "cls"):
        return ["clip"]
    if section.pooling != "auto":
        return [cast(Pool, section.pooling)]
    found: list[Pool] = ["own"] if sight.pools else []
    return [*found, *(["cls"] if sight.has_class_token else []), "mean"]  # type: ignore[list-item]


def text_pools(
    section: TowerConfig, loaded: Loaded, reach: Reach, words: SentenceFolder
) -> list[Pool]:
    """`auto`: the folder's word, end of text for CLIP, the model's own, the last token of causal
    models, the mean of encoders."""
    if section.pooling != "auto":
        return [section.pooling]
    if words.pooling is not None:
        return [words.pooling]
    if isinstance(loaded.backbone, CLIPTextModel):
        return ["eos"]
    first: Pool = "last" if is_causal(loaded.backbone) else "mean"
    own: list[Pool] = ["own"] if reach.pools else []
    return [*own, first] if loaded.pair is None else [*own, "cls", "eos", "last", "mean"]


def is_causal(backbone: Any) -> bool:
    """Whether a token sees only those before it."""
    if isinstance(backbone, CLIPTextModel):
        return True
    return is_causal_kind(backbone.config)


def is_causal_kind(settings: Any) -> bool:
    """Whether a configuration is of a model that says next words."""
    both_ways = settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(
        settings, "use_bidirectional_attention", False
    )
    return settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both_ways
