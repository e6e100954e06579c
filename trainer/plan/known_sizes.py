"""Sizes of loaded towers, from the folder's configuration or, where it is not here, as published.

A tower of the same width, depth, heads and MLP stands for the loaded one: a gated MLP of three
matrices counts as two that are half as wide again, which is as many weights and products.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import ConfigError


class Sizes(NamedTuple):
    """Of one tower."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int | None = None
    vocabulary: int | None = None
    source: str = ""


_B = (768, 12, 12, 3072)
PUBLISHED: dict[str, dict[str, Sizes]] = {
    "CLIP-ViT-B-32-laion2B": {
        "image": Sizes(*_B, patch_size=32),
        "text": Sizes(512, 12, 8, 2048, vocabulary=49408),
    },
    "CLIP-ViT-B-16-laion2B": {
        "image": Sizes(*_B, patch_size=16),
        "text": Sizes(512, 12, 8, 2048, vocabulary=49408),
    },
    "dinov2-base": {"image": Sizes(*_B, patch_size=14)},
    "Llama-2-7b-hf": {"text": Sizes(4096, 32, 32, 16512, vocabulary=32000)},
    "Qwen2-1.5B": {"text": Sizes(1536, 28, 12, 13440, vocabulary=151936)},
    "smollm2-135m": {"text": Sizes(576, 30, 9, 2304, vocabulary=49152)},
}
"""By the last part of a folder's name."""


def sizes_of(path: str, tower: str) -> Sizes:
    """ConfigError where the folder has no config.json and the name is not one of the known."""
    folder = Path(path)
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = PUBLISHED.get(folder.name, {}).get(tower)
        if known is None:
            raise ConfigError(
                f"{path} is not here, and no sizes of a {tower} tower of that name are known; put "
                f"its config.json there, or plan with sizes in place of model.{tower}.path"
            ) from None
        return known._replace(source=f"{path} is not here: planned with its published sizes")
    return _read(said, path, tower)


def _read(said: dict[str, Any], path: str, tower: str) -> Sizes:
    nested = said.get("vision_config" if tower == "image" else "text_config")
    said = {**said, **nested} if isinstance(nested, dict) else said

    def first(*names: str) -> int | None:
        found = [said[name] for name in names if isinstance(said.get(name), int)]
        return found[0] if found else None

    width = first("hidden_size", "n_embd", "dim", "d_model")
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = first("num_attention_heads", "n_head", "n_heads", "num_heads")
    if width is None or layers is None or heads is None:
        raise ConfigError(
            f"{path}/config.json says no width, layers and heads of a transformer; plan with sizes "
            f"in place of model.{tower}.path"
        )
    mlp = first("intermediate_size", "n_inner", "hidden_dim") or 4 * width
    if said.get("hidden_act") in ("silu", "swiglu") or said.get("use_swiglu_ffn"):
        mlp = mlp * 3 // 2
    patch, words = first("patch_size"), first("vocab_size")
    return Sizes(width, layers, heads, mlp, patch, words, source=f"{path}: sizes of its config")
