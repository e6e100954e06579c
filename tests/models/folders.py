"""Folders as people have them: small models of many kinds, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.models.small import LENGTH, word_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SQUARE: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
DINO: dict[str, Any] = {k: v for k, v in SQUARE.items() if k != "intermediate_size"}
WIDE = {"initializer_range": 0.2}
WORDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
ROWS = {**WORDS, "max_position_embeddings": LENGTH}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}


def clip() -> Any:
    text, vision = {**SIZES, **ROWS}, SQUARE
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.logit_scale.data.fill_(3.0)
    return model


def siglip() -> Any:
    text = {**SIZES, **ROWS, "projection_size": 32}
    model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=SQUARE))
    model.logit_scale.data.fill_(3.0)
    model.logit_bias.data.fill_(-7.0)
    return model


def siglip2_naflex() -> Any:
    text = {**SIZES, **ROWS, "projection_size": 32}
    vision = {**SIZES, "num_patches": 16, "patch_size": 8}
    return hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision))


def chinese_clip() -> Any:
    return hf.ChineseCLIPModel(
        hf.ChineseCLIPConfig(text_config={**SIZES, **ROWS}, vision_config=SQUARE, projection_dim=24)
    )


def dual_encoder() -> Any:
    """Two models that were trained apart; what is compared are their poolers' vectors."""
    return hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig.from_vision_text_configs(
            hf.ViTConfig(**SQUARE, **WIDE),
            hf.BertConfig(**SIZES, **ROWS, **WIDE),
            projection_dim=24,
        )
    )


def blip() -> Any:
    text = {**SIZES, **ROWS, **WIDE, "encoder_hidden_size": 32}
    return hf.BlipModel(hf.BlipConfig(text_config=text, vision_config=SQUARE, projection_dim=24))


IMAGES: dict[str, Callable[[], Any]] = {
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SQUARE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO, mlp_ratio=2, **WIDE)),
    "dinov2 with registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=2, **WIDE)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(**SQUARE, num_register_tokens=2, drop_path_rate=0.3, **WIDE)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SQUARE, **WIDE)),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**SQUARE, **WIDE)),
    "beit": lambda: hf.BeitModel(
        hf.BeitConfig(
            **SQUARE, vocab_size=8, drop_path_rate=0.3, layer_scale_init_value=1.0, **WIDE
        )
    ),
    "swin": lambda: hf.SwinModel(
        hf.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4
        )
    ),
    "convnext": lambda: hf.ConvNextModel(
        hf.ConvNextConfig(
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            image_size=32,
            drop_path_rate=0.3,
            layer_scale_init_value=1.0,
        )
    ),
    "clip vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SQUARE)),
}
"""Encoders of images, each with what it says of one by itself."""

OWN_VECTOR: dict[str, Callable[[Any], torch.Tensor]] = {
    **{name: lambda output: output.pooler_output for name in IMAGES},
    "vit": lambda output: output.last_hidden_state[:, 0],
    "deit": lambda output: output.last_hidden_state[:, 0],
}
"""The poolers of ViT and DeiT are for another task and left out."""

TEXTS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, **ROWS, **WIDE)),
    "roberta": lambda: hf.RobertaModel(
        hf.RobertaConfig(**SIZES, **{**ROWS, "max_position_embeddings": LENGTH + 1}, **WIDE)
    ),
    "mpnet": lambda: hf.MPNetModel(
        hf.MPNetConfig(**SIZES, **{**ROWS, "max_position_embeddings": LENGTH + 2}, **WIDE)
    ),
    "deberta": lambda: hf.DebertaV2Model(
        hf.DebertaV2Config(**SIZES, **ROWS, type_vocab_size=0, **WIDE)
    ),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**SIZES, **ROWS, cls_token_id=2, sep_token_id=1, **WIDE)
    ),
    "t5 encoder": lambda: hf.T5EncoderModel(
        hf.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
        )
    ),
    "t5": lambda: hf.T5Model(
        hf.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
        )
    ),
    "llama": lambda: hf.LlamaModel(hf.LlamaConfig(**SIZES, **ROWS, **HEADS, **WIDE)),
    "qwen": lambda: hf.Qwen3Model(hf.Qwen3Config(**SIZES, **ROWS, **HEADS, **WIDE)),
    "gemma": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**SIZES, **ROWS, **HEADS, **WIDE)),
}
"""Encoders and decoders of texts."""


def save(folder: Path, make: Callable[[], Any]) -> tuple[str, Any]:
    """The folder of a model with the tokenizer of words, and the model itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder), model
