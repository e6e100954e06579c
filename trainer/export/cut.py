"""Towers that were cut (`trainer.models.narrow`), as others' classes hold them.

Transformers' and open_clip's have as many heads and neurons in every layer, and heads that fill the
width together. A cut tower has room in such a one if its layers are filled up with zeros: a head
whose values are zero and a neuron that is read by nothing add nothing. A head that is filled up
needs larger queries, because its scores are divided by the square root of its width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models.load import ATTENTION
from trainer.models.narrow import NarrowShape, shape_of
from trainer.models.tower import Tower
from trainer.models.two_tower import TwoTower

TOWERS = ("image", "text")


def is_cut(model: TwoTower) -> bool:
    return any(shape_of(tower) is not None for tower in (model.image, model.text))


def why_not_whole(model: TwoTower) -> str:
    """Why the layers of a tower fit in no class of equal layers; empty where all do."""
    for name in TOWERS:
        shape = shape_of(model.get_submodule(name))  # type: ignore[arg-type]
        if shape is not None and heads_that_hold(shape) is None:
            return (
                f"its layers were cut to different widths, and a layer of the {name} tower has "
                f"{max(shape.heads)} heads of {shape.head_dim}, which do not fit in equal parts of "
                f"the width of {shape.width}"
            )
    return ""


def heads_that_hold(shape: NarrowShape) -> int | None:
    """The most heads of equal layers, each as wide as ours or wider; None where too few fit."""
    fitting = [
        count
        for count in range(max(1, *shape.heads), shape.width // shape.head_dim + 1)
        if shape.width % count == 0
    ]
    return max(fitting, default=None)


def filled_up(model: TwoTower) -> TwoTower:
    """A copy whose towers are plain ones of CLIP's, and say the same."""
    whole = copy.deepcopy(model)
    for name in TOWERS:
        setattr(whole, name, _whole_tower(whole.get_submodule(name)))  # type: ignore[arg-type]
    return whole


def _whole_tower(tower: Tower) -> Tower:
    shape = shape_of(tower)
    if shape is None:
        return tower
    heads, neurons = heads_that_hold(shape), max(1, *shape.neurons)
    assert heads is not None
    settings = copy.deepcopy(tower.backbone.config)
    settings.update({"num_attention_heads": heads, "intermediate_size": neurons})
    backbone: Any = type(tower.backbone)._from_config(settings, attn_implementation=ATTENTION)
    layers = zip(tower.backbone.encoder.layers, backbone.encoder.layers, strict=True)
    with torch.no_grad():
        for ours, theirs in layers:
            _fill_attention(theirs.self_attn, ours.self_attn)
            _fill_mlp(theirs.mlp, ours.mlp)
    kept = {
        name: value
        for name, value in tower.backbone.state_dict().items()
        if ".self_attn." not in name and ".mlp." not in name
    }
    backbone.load_state_dict(kept, strict=False)
    tower.backbone = backbone.eval()
    return tower


def _fill_attention(whole: Any, cut: Any) -> None:
    """Rows of queries, keys and values, and columns of the output, head by head."""
    width, room = whole.q_proj.in_features, whole.head_dim
    for part in ("q_proj", "k_proj", "v_proj"):
        _zero(getattr(whole, part))
    _zero(whole.out_proj)
    whole.out_proj.bias.copy_(cut.out_proj.bias)
    heads, inner = getattr(cut, "num_heads", 0), getattr(cut, "head_dim", 0)
    if not heads:
        return
    for part in ("q_proj", "k_proj", "v_proj"):
        larger = math.sqrt(room / inner) if part == "q_proj" else 1.0
        ours, theirs = getattr(cut, part), getattr(whole, part)
        rows = ours.weight.view(heads, inner, width) * larger
        theirs.weight.view(-1, room, width)[:heads, :inner] = rows
        theirs.bias.view(-1, room)[:heads, :inner] = ours.bias.view(heads, inner) * larger
    columns = cut.out_proj.weight.view(width, heads, inner)
    whole.out_proj.weight.view(width, -1, room)[:, :heads, :inner] = columns


def _fill_mlp(whole: Any, cut: Any) -> None:
    _zero(whole.fc1)
    _zero(whole.fc2)
    whole.fc2.bias.copy_(cut.fc2.bias)
    if not hasattr(cut, "fc1"):
        return
    count = cut.fc1.out_features
    whole.fc1.weight[:count] = cut.fc1.weight
    whole.fc1.bias[:count] = cut.fc1.bias
    whole.fc2.weight[:, :count] = cut.fc2.weight


def _zero(layer: nn.Linear) -> Tensor:
    layer.bias.zero_()
    return layer.weight.zero_()
