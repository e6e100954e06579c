"""Random views by Triton's interpreter, beside the same in torch's operations.

`TRITON_INTERPRET=1 python -m tests.kernels.interpreted_colour` prints a row for each case: the
largest difference of a pixel between 0 and 1, and how many pixels differ by more than a rounding.
"""

from __future__ import annotations

import json
import sys

import torch

from trainer.config import AugmentConfig
from trainer.data.device_views import augmented
from trainer.data.views import augment, draw_view

ALWAYS = {"jitter_probability": 1.0, "gray_probability": 0.3, "blur_probability": 0.7}
CASES = {
    "default": AugmentConfig(),
    "everything": AugmentConfig(**ALWAYS, solarize_probability=0.4),
    "nothing": AugmentConfig(flip=0, jitter_probability=0, gray_probability=0, blur_probability=0),
}
PLAIN = {"mean": (0.0, 0.0, 0.0), "deviation": (1.0, 1.0, 1.0)}


def main() -> None:
    for size in (5, 33):
        draw = torch.Generator().manual_seed(size)
        images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=draw)
        images[0] = 77  # of one colour: no hue
        ids = torch.randint(0, 2**62, (6,), generator=draw)
        for name, config in CASES.items():
            draws = draw_view(ids, torch.zeros_like(ids), seed=3, purpose="train")
            wanted = augment(images, draws, config=config, **PLAIN)
            difference = (augmented(images, draws, config=config) - wanted).abs()
            row = {
                "case": name,
                "size": size,
                "largest": float(difference.max()),
                "differing": int((difference > 1e-5).sum()),
                "changed": bool((wanted != images.float().div(255)).any()),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
