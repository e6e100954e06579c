"""Backbones: CLIP transformers built by size, or whatever transformers loads from a folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from trainer.errors import ConfigError
from trainer.models.config import ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.lora import add_lora
from trainer.models.tower import Pool, Tower

ATTENTION = "sdpa"


def image_tower(config: ModelConfig) -> Tower:
    """The image encoder that `config.image` describes."""
    section = config.image
    if section.path is None:
        backbone: Any = CLIPVisionModel._from_config(
            _vision_config(config), attn_implementation=ATTENTION
        )
        projection = None
    else:
        backbone, projection = _loaded(section.path, part="vision")
        _check_image_size(backbone, config)
    pool = _image_pool(section, backbone)
    projection = projection_of(backbone, config.embed_dim, loaded=projection)
    if section.lora:
        add_lora(backbone, section.lora)
    return Tower(backbone, projection, pool=pool, trained=section.trained)


def text_tower(config: TwoTowerConfig, tokenizer: PreTrainedTokenizerFast) -> Tower:
    """The text encoder that `config.text` describes, for the ids of `tokenizer`."""
    section = config.text
    if section.path is None:
        backbone: Any = CLIPTextModel._from_config(
            _text_config(config, tokenizer), attn_implementation=ATTENTION
        )
        projection = None
    else:
        backbone, projection = _loaded(section.path, part="text")
        _check_text(backbone, config, tokenizer)
    pool, causal = _text_pool(section, backbone), _is_causal(backbone)
    projection = projection_of(backbone, config.embed_dim, loaded=projection)
    if section.lora:
        add_lora(backbone, section.lora)
    return Tower(
        backbone,
        projection,
        pool=pool,
        trained=section.trained,
        causal=causal,
        eos_token_id=tokenizer.eos_token_id,
    )


def projection_of(backbone: Any, embed_dim: int, *, loaded: nn.Linear | None) -> nn.Linear:
    """Into the shared space: the loaded one where it fits, else CLIP's initialisation."""
    if loaded is not None and loaded.out_features == embed_dim:
        return loaded
    width = getattr(backbone.config, "hidden_size", None)
    if width is None:
        kind = type(backbone).__name__
        raise ConfigError(f"{kind} has no hidden_size; a tower is a single transformer encoder")
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _vision_config(config: ModelConfig) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        **_sizes(config.image),
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.embed_dim,
    )


def _text_config(config: TwoTowerConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    return CLIPTextConfig(
        **_sizes(config.text),
        vocab_size=len(tokenizer),
        max_position_embeddings=config.text_length,
        projection_dim=config.embed_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _sizes(section: TowerConfig) -> dict[str, Any]:
    assert section.width is not None
    return {
        "hidden_size": section.width,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "intermediate_size": section.mlp_width or 4 * section.width,
        "hidden_act": section.activation,
    }


def _loaded(path: str, *, part: str) -> tuple[Any, nn.Linear | None]:
    """The backbone at `path` in float32, and its projection where it has one (CLIP)."""
    try:
        settings = AutoConfig.from_pretrained(path)
        _settle(settings)
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": ATTENTION}
        if settings.model_type == "clip":
            return _clip_part(CLIPModel.from_pretrained(path, config=settings, **options), part)
        if settings.is_encoder_decoder:
            raise ConfigError(f"{path} is an encoder-decoder; a tower is one of the two")
        backbone = AutoModel.from_pretrained(path, config=settings, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"transformers can't load a {part} tower from {path}: {reason}"
        ) from error
    return _without_pooler(backbone), None


def _clip_part(model: CLIPModel, part: str) -> tuple[Any, nn.Linear]:
    if part == "vision":
        return model.vision_model, model.visual_projection
    return model.text_model, model.text_projection


def _without_pooler(backbone: Any) -> Any:
    """Pooling is ours; a pooler's weights would never see a gradient."""
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = None
    return backbone


def _settle(settings: Any) -> None:
    """No dropout, and no cache of keys and values, which only generation needs."""
    for name, value in vars(settings).items():
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
            setattr(settings, name, 0.0)
    if getattr(settings, "use_cache", False):
        settings.use_cache = False
    for name in ("vision_config", "text_config"):
        if hasattr(settings, name):
            _settle(getattr(settings, name))


def _check_image_size(backbone: Any, config: ModelConfig) -> None:
    size = getattr(backbone.config, "image_size", config.image_size)
    if size != config.image_size:
        raise ConfigError(
            f"image_size is {config.image_size}, but {config.image.path} was made for {size}; "
            f"set model.image_size={size}"
        )


def _check_text(backbone: Any, config: TwoTowerConfig, tokenizer: Any) -> None:
    rows = backbone.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but {config.text.path} has embeddings "
            f"for {rows}; use the tokenizer of that model"
        )
    longest = getattr(backbone.config, "max_position_embeddings", None) or config.text_length
    if config.text_length > longest:
        raise ConfigError(
            f"text_length is {config.text_length}, but {config.text.path} reads at most "
            f"{longest} tokens; set model.text_length={longest}"
        )


def _image_pool(section: TowerConfig, backbone: Any) -> Pool:
    if section.pooling in ("eos", "last"):
        raise ConfigError(
            f"image.pooling is {section.pooling}, which is for texts; use mean or cls"
        )
    is_clip = isinstance(backbone, CLIPVisionModel)
    if section.pooling == "mean":
        return "mean"
    return "clip" if is_clip else "cls"


def _text_pool(section: TowerConfig, backbone: Any) -> Pool:
    """`auto`: end of text for CLIP, last token for causal models, mean for encoders."""
    if section.pooling != "auto":
        return section.pooling
    if isinstance(backbone, CLIPTextModel):
        return "eos"
    return "last" if _is_causal(backbone) else "mean"


def _is_causal(backbone: Any) -> bool:
    if isinstance(backbone, CLIPTextModel):
        return True
    settings = backbone.config
    both_ways = settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(
        settings, "use_bidirectional_attention", False
    )
    return settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not both_ways
