"""The README of an exported model."""

from __future__ import annotations

from trainer.data.views import IMAGE_MEAN, IMAGE_STD
from trainer.models.config import TowerConfig, TwoTowerConfig

_CLIP_USE = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

folder = "."  # where this file is
model = CLIPModel.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)

tokens = tokenizer(
    ["a red apple", "a cat"], padding=True, truncation=True, max_length={text_length},
    return_token_type_ids=False, return_tensors="pt",
)
pixels = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    print(model(**tokens, **pixels).logits_per_image.softmax(dim=-1))
```
"""

_TOWERS_USE = """\
`CLIPModel` can't load it: {why_not_clip}. `image/` and `text/` hold the towers for
`transformers.AutoModel`; pooling and projections are ours, so from a checkout of the trainer:

```python
from trainer.export import load_exported

model, tokenizer = load_exported(".")  # where this file is
```
"""


def model_card(
    config: TwoTowerConfig, *, why_not_clip: str = "", data_licence: str | None = None
) -> str:
    """Markdown: what the model is, what it must be fed, how to load it, and under which terms."""
    use = _TOWERS_USE if why_not_clip else _CLIP_USE
    mean, std = (", ".join(f"{value:.8f}" for value in row) for row in (IMAGE_MEAN, IMAGE_STD))
    licence = data_licence or (
        "Not stated at export. The weights may be bound by the terms of the images and texts they "
        "were trained on; find these out before you pass the weights on."
    )
    return f"""\
# Image and text encoder

Maps images and texts to unit vectors of {config.embed_dim} numbers whose cosines say how well they
match.

- Image tower: {_tower(config.image)}
- Text tower: {_tower(config.text)}; at most {config.text_length} tokens
- Prototype heads: {_head(config)}

## Input

- Images: {config.image_size} x {config.image_size} pixels, RGB. The shorter side is resized to
  {config.image_size} (bicubic, antialiased), then the centre is cropped. Lay transparent images on
  the background of the training run first (white by default): the processor drops transparency.
- Normalisation: pixels in [0, 1], minus ({mean}), divided by ({std}).
- Texts: the tokenizer in this folder, which adds begin and end by itself.

## Use

{use.format(text_length=config.text_length, why_not_clip=why_not_clip)}
`native/model.safetensors` has all weights under the trainer's own names, prototype heads included,
and `native/model.json` the configuration.

## Training data and its licence

{licence}
"""


def _tower(section: TowerConfig) -> str:
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
