"""EfficientNet-Lite (Liu 2020; blocks of arXiv 1905.11946 without squeeze, ReLU6): its features.

Strides pad as TensorFlow does: what is missing, the odd pixel to the right and below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from trainer.errors import DataError

FEATURES = 1280
_STEM = 32


class Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
"""Of Lite0; the larger ones scale channels and repeats."""


class Lite(NamedTuple):
    """One size of the family."""

    width: float
    depth: float
    image_size: int


SIZES = {
    "efficientnet-lite0": Lite(1.0, 1.0, 224),
    "efficientnet-lite1": Lite(1.0, 1.1, 240),
    "efficientnet-lite2": Lite(1.1, 1.2, 260),
}


class EfficientNetLite(nn.Module):
    """Pixels to the 1280 features under the classifier: the mean over places of the last maps."""

    def __init__(self, size: Lite) -> None:
        super().__init__()
        self.stem = _Conv(3, _STEM, kernel=3, stride=2)
        channels, blocks = _STEM, []
        for number, stage in enumerate(STAGES):
            outer = number in (0, len(STAGES) - 1)  # the family never repeats these
            repeats = stage.repeats if outer else math.ceil(stage.repeats * size.depth)
            for repeat in range(repeats):
                stride = stage.stride if repeat == 0 else 1
                wide = _rounded(stage.channels * size.width)
                blocks.append(_Block(channels, wide, stage, stride))
                channels = wide
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(channels, FEATURES, kernel=1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 size size"]
    ) -> Float[Tensor, "batch features"]:
        maps = self.stem(pixels)
        for block in self.blocks:
            maps = block(maps)
        features: Tensor = self.head(maps).mean((2, 3))
        return features

    def load_published(self, weights: Mapping[str, Tensor]) -> None:
        """Take the weights of the published files by position; their classifier is left out.

        Both list the same layers in the same order. DataError where a shape differs.
        """
        kept = {n: v for n, v in weights.items() if not n.startswith("_fc.")}
        theirs = sorted(kept.items(), key=lambda item: _place(item[0]))
        own = self.state_dict()
        if len(own) != len(theirs):
            raise DataError(f"{len(theirs)} tensors do not fill the {len(own)} of this model")
        for name, (other, value) in zip(own, theirs, strict=True):
            if own[name].shape != value.shape:
                raise DataError(
                    f"{other} {tuple(value.shape)} is not {name} {tuple(own[name].shape)}"
                )
        self.load_state_dict(dict(zip(own, (value for _, value in theirs), strict=True)))


class _Conv(nn.Module):
    """Convolution with TensorFlow's padding, batch norm, ReLU6 where `active`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.active = active

    def forward(self, maps: Tensor) -> Tensor:
        kernel, stride = self.convolution.kernel_size[0], self.convolution.stride[0]
        height, width = (_missing(side, kernel, stride) for side in maps.shape[2:])
        edges = (width // 2, width - width // 2, height // 2, height - height // 2)
        found: Tensor = self.norm(self.convolution(nn.functional.pad(maps, edges)))
        return found.clamp(0, 6) if self.active else found


class _Block(nn.Module):
    """Widen, filter every channel by itself, narrow; added to its input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        widen = [_Conv(inputs, wide, kernel=1)] if stage.expansion != 1 else []
        filtered = _Conv(wide, wide, kernel=stage.kernel, stride=stride, groups=wide)
        self.layers = nn.Sequential(*widen, filtered, _Conv(wide, outputs, kernel=1, active=False))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        found: Tensor = self.layers(maps)
        return maps + found if self.adds else found


def _missing(side: int, kernel: int, stride: int) -> int:
    return max(0, (math.ceil(side / stride) - 1) * stride + kernel - side)


def _rounded(channels: float) -> int:
    """A multiple of 8 near it, not more than a tenth below."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


_PARTS = ("expand", "_bn0", "depthwise", "_bn1", "project", "_bn2")
_FIELDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _place(name: str) -> tuple[int, int, int]:
    """Where a published tensor stands: block (the stem before, the head behind), layer, field."""
    parts = name.split(".")
    field = _FIELDS.index(parts[-1])
    if parts[0] == "_blocks":
        layer = next(i for i, part in enumerate(_PARTS) if parts[2].startswith((part, f"_{part}")))
        return int(parts[1]), layer, field
    outer = {"_conv_stem": (-1, 0), "_bn0": (-1, 1), "_conv_head": (999, 0), "_bn1": (999, 1)}
    block, layer = outer[parts[0]]
    return block, layer, field
