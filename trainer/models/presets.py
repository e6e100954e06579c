"""Sizes of models by name."""

from __future__ import annotations

from typing import Any


def _preset(
    *,
    image: tuple[int, int, int],
    text: tuple[int, int, int],
    sizes: tuple[int, int, int],
    words: tuple[int, int],
    activation: str = "quick_gelu",
    head: dict[str, int] | None = None,
) -> dict[str, Any]:
    """`image`, `text`: width, layers, heads. `sizes`: embed dim, pixels, patch."""
    towers = {
        name: {"width": width, "layers": layers, "heads": heads, "activation": activation}
        for name, (width, layers, heads) in {"image": image, "text": text}.items()
    }
    embed_dim, image_size, patch_size = sizes
    return {
        **towers,
        "embed_dim": embed_dim,
        "image_size": image_size,
        "patch_size": patch_size,
        "text_length": words[0],
        "vocabulary": words[1],
        "head": head or {},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _preset(
        image=(192, 5, 3),
        text=(128, 4, 4),
        sizes=(128, 64, 16),
        words=(32, 4096),
        activation="gelu",
        head={"hidden": 512, "dim": 64},
    ),
    "small": _preset(
        image=(384, 12, 6),
        text=(256, 8, 4),
        sizes=(256, 128, 16),
        words=(48, 16384),
        activation="gelu",
        head={"hidden": 1024, "dim": 128},
    ),
    "vit_b_32": _preset(
        image=(768, 12, 12), text=(512, 12, 8), sizes=(512, 224, 32), words=(77, 49152)
    ),
    "vit_b_16": _preset(
        image=(768, 12, 12), text=(512, 12, 8), sizes=(512, 224, 16), words=(77, 49152)
    ),
    "vit_l_14": _preset(
        image=(1024, 24, 16), text=(768, 12, 12), sizes=(768, 224, 14), words=(77, 49152)
    ),
}
