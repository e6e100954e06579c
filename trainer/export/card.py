"""The README of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from PIL import Image

from trainer.export.card_uses import (
    CLIP_USE,
    CUT_USE,
    IMAGE_TOWER_USE,
    IMAGE_USE,
    PATCH_USE,
    SIGLIP_USE,
    SIGMOID,
    SOFTMAX,
    TOWERS_USE,
    UNKNOWN_LICENCE,
)
from trainer.models.config import ImageTowerConfig, ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.load import model_pixels
from trainer.models.narrow import NarrowShape
from trainer.store import Identity


def patch_card(
    config: ImageTowerConfig,
    *,
    hidden: int,
    texts: Identity | None,
    data_licence: str | None = None,
) -> str:
    """As `model_card`, of an image encoder that is compared with a language model's vectors."""
    return f"""\
# Image encoder for a frozen language model's vectors

Maps images to unit vectors of {config.embed_dim} numbers, to be compared with those of texts.

- Image tower: {_tower(config.image)}; the mean over patches of a head of {hidden} hidden numbers
- Texts: {_texts(texts)}

## Input

{_image_input(config)}

## Use

{PATCH_USE.format(hidden=hidden, dim=config.embed_dim)}
`native/model.safetensors` has all weights under the trainer's own names, with the scale and bias of
the logits; `native/model.json` the configuration and the identity of the texts' vectors.

## Training data and its licence

{data_licence or UNKNOWN_LICENCE}
"""


def _texts(texts: Identity | None) -> str:
    if texts is None:
        return "not known at export; those of the store that the run's YAML names"
    layer = "last layer" if texts.layer == -1 else f"layer {texts.layer}"
    return (
        f"{texts.teacher} (weights {texts.model[:12]}), {layer}, pooling {texts.pooling}, prompts "
        f"{texts.prompts[:24]}"
    )


def image_card(
    config: ImageTowerConfig, *, why_apart: str = "", data_licence: str | None = None
) -> str:
    """As `model_card`, of an image tower alone."""
    use = IMAGE_TOWER_USE if why_apart else IMAGE_USE
    return f"""\
# Image encoder

Maps images to unit vectors of {config.embed_dim} numbers; similar images have a high cosine.

- Image tower: {_tower(config.image)}

## Input

{_image_input(config)}

## Use

{use.format(why_apart=why_apart)}
`native/model.safetensors` has all weights under the trainer's own names and `native/model.json`
the configuration. The prototypes it was trained against are not part of it.

## Training data and its licence

{data_licence or UNKNOWN_LICENCE}
"""


def model_card(
    config: TwoTowerConfig,
    form: str,
    towers: tuple[str, str],
    *,
    scale: float,
    bias: float | None,
    why_apart: str = "",
    data_licence: str | None = None,
    left: Mapping[str, NarrowShape | None] = MappingProxyType({}),
) -> str:
    """Markdown: what the model is, what it must be fed, how to load it, and under which terms.

    `form` is the class of transformers that holds the model; where there is a reason why none does,
    `towers` are the classes of its two parts, empty where these have none either. `scale` and
    `bias` make logits of cosines. `left` is what towers that were cut have left.
    """
    whole = SIGLIP_USE if form == "SiglipModel" else CLIP_USE
    use = (TOWERS_USE if any(towers) else CUT_USE) if why_apart else whole
    probabilities = SOFTMAX if bias is None else SIGMOID
    image, text = towers
    told = use.format(
        probabilities=probabilities, why_apart=why_apart, form=form, image=image, text=text
    )
    return f"""\
# Image and text encoder

Maps images and texts to unit vectors of {config.embed_dim} numbers whose cosines say how well they
match.

- Image tower: {_tower(config.image, left.get("image"))}
- Text tower: {_tower(config.text, left.get("text"))}; at most {config.text_length} tokens
- Prototype heads: {_head(config)}
- Logits: {_logits(scale, bias, form)}

## Input

{_image_input(config)}
- Texts: the tokenizer in this folder, which adds begin and end by itself and, with
  `truncation=True`, cuts at {config.text_length} tokens.

## Use

{told}
`native/model.safetensors` has all weights under the trainer's own names, prototype heads included,
and `native/model.json` the configuration.

## Training data and its licence

{data_licence or UNKNOWN_LICENCE}
"""


def _logits(scale: float, bias: float | None, form: str) -> str:
    if bias is None:
        return f"{scale:.4f} times the cosine; softmax over the candidates"
    said = (
        f"{scale:.4f} times the cosine, plus a bias of {bias:.4f} (trained with the sigmoid loss): "
        "sigmoid of that is the probability that a pair matches"
    )
    if form == "SiglipModel":
        return said
    return (
        f"{said}. transformers' CLIP classes have no bias and show softmax: add "
        "`config.logit_bias` yourself, or read `native/`"
    )


def _image_input(config: ModelConfig) -> str:
    pixels = model_pixels(config)
    mean, std = (
        ", ".join(f"{value:.8f}" for value in row)
        for row in (pixels.unit_mean, pixels.unit_deviation)
    )
    size, edge = pixels.size, pixels.edge or pixels.size
    side = "Both sides are" if pixels.fit == "square" else "The shorter side is"
    filtered = Image.Resampling(pixels.resample).name.lower()
    return f"""\
- Images: {size} x {size} pixels, RGB. {side} resized to
  {edge} ({filtered}, antialiased), then the centre is cropped; `AutoImageProcessor` on Pillow gives
  the very pixels of the training run's evaluation, of gray, palette and CMYK images too. What a
  processor can't say: lay transparent images on the background of the training run first (white
  by default), and divide 16-bit gray by 256.
- Normalisation: pixels in [0, 1], minus ({mean}), divided by ({std})."""


def _tower(section: TowerConfig, left: NarrowShape | None = None) -> str:
    if left is not None:
        heads, neurons = (f"{min(of)} to {max(of)}" for of in (left.heads, left.neurons))
        return (
            f"CLIP transformer, cut: {len(left.heads)} layers of width {left.width}, {heads} heads "
            f"of {left.head_dim} and {neurons} neurons a layer"
        )
    kind = (
        f"loaded from `{section.path}`"
        if section.path
        else f"CLIP transformer, {section.layers} layers of width {section.width}, "
        f"{section.heads} heads"
    )
    return kind if section.trained else f"{kind}, not trained"


def _head(config: TwoTowerConfig) -> str:
    if config.head is None:
        return "none"
    return f"{config.head.dim} numbers; only training uses them"
