"""The README of an exported model."""

from __future__ import annotations

from PIL import Image

from trainer.models.config import ImageTowerConfig, ModelConfig, TowerConfig, TwoTowerConfig
from trainer.models.load import model_pixels
from trainer.store import Identity

_CLIP_USE = """\
```python
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

folder = "."  # where this file is
model = CLIPModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)

batch = processor(
    text=["a red apple", "a cat"], images=Image.open("picture.png").convert("RGB"),
    padding=True, truncation=True, return_tensors="pt",
)
with torch.inference_mode():
    logits = model(**batch).logits_per_image
print({probabilities}
```
"""
_SIGLIP_USE = """\
```python
import torch
from PIL import Image
from transformers import AutoProcessor, SiglipModel

folder = "."  # where this file is
model = SiglipModel.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)

batch = processor(
    text=["a red apple", "a cat"], images=Image.open("picture.png").convert("RGB"),
    padding="max_length", truncation=True, return_tensors="pt",
)
with torch.inference_mode():
    logits = model(**batch).logits_per_image
print(torch.sigmoid(logits))  # of each pair, whether it matches
```

Rows must be filled up (`padding="max_length"`), and no mask is given: the text tower sees the
padding and pools at the end of the row.
"""
_SOFTMAX = "logits.softmax(dim=-1))  # of the texts, which one is the picture's"
_SIGMOID = "torch.sigmoid(logits + model.config.logit_bias))  # of each pair, whether it matches"

_TOWERS_USE = """\
`{form}` can't load it: {why_apart}. `image/` and `text/` hold the towers for
transformers' `{image}` and `{text}`; pooling and projections are ours, so from a checkout of the
trainer:

```python
from trainer.export.native import load_exported

model, tokenizer = load_exported(".")  # where this file is
```
"""

_UNKNOWN_LICENCE = (
    "Not stated at export. The weights may be bound by the terms of the images and texts they "
    "were trained on; find these out before you pass the weights on."
)

_IMAGE_USE = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

folder = "."  # where this file is
model = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)

pixels = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    print(torch.nn.functional.normalize(model(**pixels).image_embeds, dim=-1))
```

`CLIPVisionModel.from_pretrained(folder)` loads the tower without its projection.
"""

_IMAGE_TOWER_USE = """\
transformers' CLIP classes can't load it: {why_apart}. `image/` holds the tower for
`transformers.AutoModel`; pooling and projection are ours, so from a checkout of the trainer:

```python
from trainer.export.native import load_exported_image_tower

model = load_exported_image_tower(".")  # where this file is
```
"""


_PATCH_USE = """\
```python
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionModel

folder = "."  # where this file is
tower = CLIPVisionModel.from_pretrained(f"{{folder}}/image").eval()
processor = AutoImageProcessor.from_pretrained(folder)
head = torch.nn.Sequential(
    torch.nn.Linear(tower.config.hidden_size, {hidden}), torch.nn.GELU(),
    torch.nn.Linear({hidden}, {dim}), torch.nn.LayerNorm({dim}),
)
weights, ours = load_file(f"{{folder}}/native/model.safetensors"), "image.projection."
head.load_state_dict({{n[len(ours):]: w for n, w in weights.items() if n.startswith(ours)}})

pixels = processor(Image.open("picture.png").convert("RGB"), return_tensors="pt")
with torch.inference_mode():
    patches = tower(**pixels).last_hidden_state[:, 1:]
    print(torch.nn.functional.normalize(head(patches).mean(dim=1), dim=-1))
```

What `tower` pools by itself is not trained. From a checkout of the trainer, the whole model:

```text
from trainer.export.native import load_exported_patch_tower
```
"""


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

{_PATCH_USE.format(hidden=hidden, dim=config.embed_dim)}
`native/model.safetensors` has all weights under the trainer's own names, with the scale and bias of
the logits; `native/model.json` the configuration and the identity of the texts' vectors.

## Training data and its licence

{data_licence or _UNKNOWN_LICENCE}
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
    use = _IMAGE_TOWER_USE if why_apart else _IMAGE_USE
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

{data_licence or _UNKNOWN_LICENCE}
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
) -> str:
    """Markdown: what the model is, what it must be fed, how to load it, and under which terms.

    `form` is the class of transformers that holds the model; where there is a reason why none does,
    `towers` are the classes of its two parts. `scale` and `bias` make logits of cosines.
    """
    whole = _SIGLIP_USE if form == "SiglipModel" else _CLIP_USE
    use = _TOWERS_USE if why_apart else whole
    probabilities = _SOFTMAX if bias is None else _SIGMOID
    image, text = towers
    told = use.format(
        probabilities=probabilities, why_apart=why_apart, form=form, image=image, text=text
    )
    return f"""\
# Image and text encoder

Maps images and texts to unit vectors of {config.embed_dim} numbers whose cosines say how well they
match.

- Image tower: {_tower(config.image)}
- Text tower: {_tower(config.text)}; at most {config.text_length} tokens
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

{data_licence or _UNKNOWN_LICENCE}
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
