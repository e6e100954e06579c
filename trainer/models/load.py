"""Towers: CLIP transformers built by size, or whatever transformers loads from a folder."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)

from trainer.data.pixels import Pixels, folder_pixels
from trainer.models.config import ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.fitting import refuse_text_pooling
from trainer.models.folder import local_folder
from trainer.models.folder_tower import loaded_image_tower, loaded_text_tower
from trainer.models.projection import new_projection
from trainer.models.stored_tower import stored_tower
from trainer.models.tower import Pool, Tower

ATTENTION = "sdpa"
WHITE = (255, 255, 255)


def image_tower(config: ModelConfig) -> Tower:
    """The image encoder that `config.image` describes."""
    section = config.image
    if section.stored is not None:
        return stored_tower(section.stored, config.embed_dim, projection=section.projection)
    if section.path is not None:
        return loaded_image_tower(config, local_folder(section.path))
    backbone: Any = CLIPVisionModel._from_config(
        _vision_config(config), attn_implementation=ATTENTION
    )
    projection = new_projection(section.width, config.embed_dim)
    pool: Pool = "mean" if section.pooling == "mean" else "clip"
    refuse_text_pooling(section)
    return Tower(backbone, projection, pool=pool, trained=section.trained)


def text_tower(config: TwoTowerConfig, tokenizer: PreTrainedTokenizerFast) -> Tower:
    """The text encoder that `config.text` describes, for the ids of `tokenizer`."""
    section = config.text
    if section.path is not None:
        return loaded_text_tower(config, local_folder(section.path), tokenizer)
    backbone: Any = CLIPTextModel._from_config(
        _text_config(config, tokenizer), attn_implementation=ATTENTION
    )
    projection = new_projection(section.width, config.embed_dim)
    pool: Pool = "eos" if section.pooling == "auto" else section.pooling
    return Tower(
        backbone,
        projection,
        pool=pool,
        trained=section.trained,
        causal=True,
        eos_token_id=tokenizer.eos_token_id,
    )


@lru_cache(maxsize=16)
def _folder_pixels(path: str, size: int, background: tuple[int, int, int]) -> Pixels | None:
    return folder_pixels(local_folder(path), size=size, background=background)


def model_pixels(config: ModelConfig, background: tuple[int, int, int] = WHITE) -> Pixels:
    """How images become the input of the image tower: as its folder says, else as for CLIP."""
    path, size = config.image.path, config.image_size
    said = None if path is None else _folder_pixels(path, size, background)
    return said or Pixels(size, background=background)


def pixels_note(config: ModelConfig, path: str) -> str:
    """For people: what was decided about a loaded tower's images."""
    said = _folder_pixels(path, config.image_size, WHITE)
    if said is None:
        return f"images: {path} has no image processor, so they are prepared as for CLIP"
    own = folder_pixels(local_folder(path))
    assert own is not None
    other = "" if own.size == config.image_size else f", made for {own.size} px"
    return f"images: as the processor of {path} says{other}: {said.text}"


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
