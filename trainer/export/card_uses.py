"""How an exported model is loaded, as its README shows it."""

from __future__ import annotations

CLIP_USE = """\
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
SIGLIP_USE = """\
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
SOFTMAX = "logits.softmax(dim=-1))  # of the texts, which one is the picture's"
SIGMOID = "torch.sigmoid(logits + model.config.logit_bias))  # of each pair, whether it matches"

TOWERS_USE = """\
`{form}` can't load it: {why_apart}. `image/` and `text/` hold the towers for
transformers' `{image}` and `{text}`; pooling and projections are ours, so from a checkout of the
trainer:

```python
from trainer.export.native import load_exported

model, tokenizer = load_exported(".")  # where this file is
```
"""

CUT_USE = """\
No class of transformers or open_clip can hold it: {why_apart}. From a checkout of the trainer:

```python
from trainer.export.native import load_exported

model, tokenizer = load_exported(".")  # where this file is
```

`tools/export.py --onnx` writes a graph of each tower, which needs no class.
"""

UNKNOWN_LICENCE = (
    "Not stated at export. The weights may be bound by the terms of the images and texts they "
    "were trained on; find these out before you pass the weights on."
)

IMAGE_USE = """\
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

IMAGE_TOWER_USE = """\
transformers' CLIP classes can't load it: {why_apart}. `image/` holds the tower for
`transformers.AutoModel`; pooling and projection are ours, so from a checkout of the trainer:

```python
from trainer.export.native import load_exported_image_tower

model = load_exported_image_tower(".")  # where this file is
```
"""


PATCH_USE = """\
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
