"""A CLIP tower in which every layer has heads and neurons of its own number."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModel

from trainer.models.load import ATTENTION
from trainer.models.tower import Tower


class NarrowShape(NamedTuple):
    """What a tower has left of its units; heads and neurons for each layer."""

    width: int
    head_dim: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> NarrowShape:
        """What `_asdict` said, after JSON."""
        heads, neurons = (tuple(map(int, said[name])) for name in ("heads", "neurons"))
        return cls(int(said["width"]), int(said["head_dim"]), heads, neurons)


class BiasAttention(nn.Module):
    """An attention layer whose heads have all gone: what is left is its output's bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_proj = _Bias(width)

    def forward(self, hidden_states: Float[Tensor, "b n d"], **_: Any) -> tuple[Tensor, None]:
        return self.out_proj(hidden_states), None


class _Bias(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        return self.bias.expand_as(states)


class BiasMlp(nn.Module):
    """An MLP whose neurons have all gone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc2 = _Bias(width)

    def forward(self, hidden_states: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(hidden_states)  # type: ignore[no-any-return]


def narrowed(tower: Tower, shape: NarrowShape) -> Tower:
    """A tower of the same kind with these sizes; what it has learned is to be filled in."""
    result = narrow_tower(
        *(type(tower.backbone), tower.backbone.config, shape),
        embed_dim=tower.projection.out_features,
        pool=tower.pool,
        trained=tower.trained,
        causal=tower.causal,
        eos_token_id=tower.eos_token_id,
    )
    result.pair, result.note = tower.pair, tower.note
    return result


def narrow_tower(
    kind: Any, settings: Any, shape: NarrowShape, *, embed_dim: int, **how: Any
) -> Tower:
    """A tower around a backbone of this class, which `settings` describe but for its sizes.

    `how` is what `Tower` must be told besides.
    """
    settings = copy.deepcopy(settings)
    # One head of the whole width is only what the class needs to begin with.
    settings.update({"hidden_size": shape.width, "num_attention_heads": 1})
    backbone: Any = kind._from_config(settings, attn_implementation=ATTENTION)
    tower = Tower(backbone, nn.Linear(shape.width, embed_dim, bias=False), **how)
    narrow(tower, shape)
    return tower


def shape_of(tower: Tower) -> NarrowShape | None:
    """What is left of a CLIP tower that has been cut; None of one whose layers are as its
    configuration says, and of others."""
    if not isinstance(tower.backbone, CLIPTextModel | CLIPVisionModel):
        return None
    settings: Any = tower.backbone.config
    layers = list(tower.backbone.encoder.layers)
    found = NarrowShape(
        settings.hidden_size,
        max(getattr(layer.self_attn, "head_dim", 1) for layer in layers),
        tuple(getattr(layer.self_attn, "num_heads", 0) for layer in layers),
        tuple(getattr(getattr(layer.mlp, "fc1", None), "out_features", 0) for layer in layers),
    )
    # One head that was left of a wide tower is one of its own width, not of the tower's.
    return None if found == whole_shape(settings) else found


def whole_shape(settings: Any) -> NarrowShape:
    """Of a tower that nothing was cut from."""
    width, heads, layers = (
        settings.hidden_size,
        settings.num_attention_heads,
        settings.num_hidden_layers,
    )
    return NarrowShape(
        *(width, width // heads, (heads,) * layers, (settings.intermediate_size,) * layers)
    )


def narrow(tower: Tower, shape: NarrowShape) -> None:
    """Give the layers of a CLIP tower of the right width their own heads and neurons, in place.

    The new layers' weights are zero, to be filled.
    """
    width, head_dim = shape.width, shape.head_dim
    for layer, heads, neurons in zip(
        tower.backbone.encoder.layers, shape.heads, shape.neurons, strict=True
    ):
        if not heads:
            layer.self_attn = BiasAttention(width)
        else:
            attention = layer.self_attn
            for part in ("q_proj", "k_proj", "v_proj"):
                setattr(attention, part, _zeros(width, heads * head_dim))
            attention.out_proj = _zeros(heads * head_dim, width)
            attention.num_heads, attention.head_dim = heads, head_dim
            attention.scale = head_dim**-0.5
        if not neurons:
            layer.mlp = BiasMlp(width)
        else:
            layer.mlp.fc1, layer.mlp.fc2 = _zeros(width, neurons), _zeros(neurons, width)


def _zeros(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
