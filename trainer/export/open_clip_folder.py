"""The same weights as open_clip reads them.

folder/                open_clip_config.json, open_clip_model.safetensors, beside the tokenizer:
                       `open_clip.create_model_and_transforms("local-dir:FOLDER")`
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from trainer.data.pixels import Pixels
from trainer.errors import ConfigError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_INTERPOLATIONS = {
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.BILINEAR: "bilinear",
}


def save_open_clip(
    clip: CLIPModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    text_length: int,
    images: Pixels,
    bias: float | None = None,
) -> None:
    """Write both files. ConfigError where open_clip can't prepare images as the model was trained.

    Its text tower looks for the largest token id unless it is told which one ends a text, and pads
    with 0; ours are said.
    """
    weights = open_clip_weights(clip)
    if bias is not None:
        weights["logit_bias"] = torch.tensor(bias)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "model_cfg": _model(clip, tokenizer, text_length, bias),
        "preprocess_cfg": _preprocessing(images),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def open_clip_weights(clip: CLIPModel) -> dict[str, Tensor]:
    """By open_clip's names; the three products of an attention are one matrix there."""
    ours = {name: value.detach().float() for name, value in clip.state_dict().items()}
    weights = {
        "logit_scale": ours["logit_scale"],
        "text_projection": ours["text_projection.weight"].T,
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": ours["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": ours["text_model.final_layer_norm.weight"],
        "ln_final.bias": ours["text_model.final_layer_norm.bias"],
        "visual.proj": ours["visual_projection.weight"].T,
        "visual.class_embedding": ours["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": ours["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": ours["vision_model.embeddings.patch_embedding.weight"],
    }
    for theirs, name in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for kind in ("weight", "bias"):
            weights[f"visual.{theirs}.{kind}"] = ours[f"vision_model.{name}.{kind}"]
    for tower, place in (("text", ""), ("vision", "visual.")):
        layers = getattr(clip.config, f"{tower}_config").num_hidden_layers
        for layer in range(layers):
            block = _block(ours, f"{tower}_model.encoder.layers.{layer}.")
            before = f"{place}transformer.resblocks.{layer}."
            weights |= {before + name: value for name, value in block.items()}
    return {name: value.contiguous().clone() for name, value in weights.items()}


def _block(ours: dict[str, Tensor], before: str) -> dict[str, Tensor]:
    block = {
        f"attn.in_proj_{kind}": torch.cat(
            [ours[f"{before}self_attn.{part}_proj.{kind}"] for part in "qkv"]
        )
        for kind in ("weight", "bias")
    }
    for name, theirs in _PARTS.items():
        for kind in ("weight", "bias"):
            block[f"{theirs}.{kind}"] = ours[f"{before}{name}.{kind}"]
    return block


def _model(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, text_length: int, bias: float | None
) -> dict[str, Any]:
    vision: Any = clip.config.vision_config
    text: Any = clip.config.text_config
    _refuse_other_activations(vision.hidden_act, text.hidden_act)
    model: dict[str, Any] = {
        "embed_dim": clip.config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": _ratio(vision),
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        },
        "text_cfg": {
            "context_length": text_length,
            "vocab_size": text.vocab_size,
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "mlp_ratio": _ratio(text),
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
            "hf_tokenizer_name": ".",
            "norm_kwargs": {"eps": text.layer_norm_eps},
        },
    }
    return model if bias is None else model | {"init_logit_bias": bias}


def _ratio(settings: Any) -> float:
    """What open_clip multiplies the width by, and cuts to a whole number of neurons."""
    width, neurons = settings.hidden_size, settings.intermediate_size
    ratio: float = neurons / width
    return ratio if int(width * ratio) == neurons else math.nextafter(ratio, math.inf)


def _refuse_other_activations(*activations: str) -> None:
    if len(set(activations)) > 1 or activations[0] not in ("gelu", "quick_gelu"):
        raise ConfigError(
            f"open_clip has one activation for both towers, gelu or quick_gelu; this model has "
            f"{' and '.join(activations)}; export it without --open-clip"
        )


def _preprocessing(images: Pixels) -> dict[str, Any]:
    edge = images.edge or images.size
    if images.fit != "square" and edge != images.size:
        raise ConfigError(
            f"open_clip resizes and crops to one size, and this model resizes to {edge} and crops "
            f"{images.size}; export it without --open-clip"
        )
    if images.resample not in _INTERPOLATIONS:
        raise ConfigError(
            "open_clip resizes by bicubic or bilinear, and this model otherwise; export it without "
            "--open-clip"
        )
    return {
        "size": images.size,
        "mode": "RGB",
        "mean": list(images.unit_mean),
        "std": list(images.unit_deviation),
        "interpolation": _INTERPOLATIONS[Image.Resampling(images.resample)],
        "resize_mode": "squash" if images.fit == "square" else "shortest",
    }
