"""A CLIP tower whose channels, heads and neurons are multiplied by gates (TinyCLIP, section 3.2).

With gates of 0 and 1 it says exactly what the smaller tower says that has only the open units. Two
places make the difference to the published code, whose masked and pruned models differ: the final
norm is gated as every other one, and a layer without heads keeps its bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModel

from trainer.errors import ConfigError
from trainer.losses.sparse_gates import Gates
from trainer.models.tower import Tower


class GatedTower:
    """Puts gates into a tower's passes. They are no parameters of it: whoever owns them sets
    `drawn` for training, where gradients collect, and `final` for evaluation. None: the tower as
    it is."""

    def __init__(self, tower: Tower) -> None:
        backbone: Any = tower.backbone
        if not isinstance(tower.backbone, CLIPTextModel | CLIPVisionModel):
            kind = type(backbone).__name__
            raise ConfigError(f"gates are for CLIP's towers, not for a {kind}")
        self.drawn: Gates | None = None
        self.final: Gates | None = None
        self._tower = tower
        self.sizes = gate_sizes(backbone)
        self.head_dim = max(
            getattr(layer.self_attn, "head_dim", 0) for layer in backbone.encoder.layers
        )
        self._counts = [part.sum(dim=1).int().tolist() for part in self.sizes[1:]]
        backbone.embeddings.register_forward_hook(self._scale_output)
        for name, module in backbone.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(self._norm)
            elif name.endswith(("out_proj", "fc2")):
                module.register_forward_hook(self._scale_output)
        for number, layer in enumerate(backbone.encoder.layers):
            if self._counts[0][number]:
                layer.self_attn.out_proj.register_forward_pre_hook(_before(self._heads, number))
            if self._counts[1][number]:
                layer.mlp.fc2.register_forward_pre_hook(_before(self._neurons, number))

    @property
    def values(self) -> Gates | None:
        """What counts in the mode that the tower is in."""
        return self.drawn if self._tower.training else self.final

    def _heads(self, gates: Gates, layer: int) -> Tensor:
        heads = gates.heads[layer, : self._counts[0][layer]]
        return heads.repeat_interleave(self.head_dim)

    def _neurons(self, gates: Gates, layer: int) -> Tensor:
        return gates.neurons[layer, : self._counts[1][layer]]

    def _scale_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        values = self.values
        return None if values is None else output * values.hidden.to(output.dtype)

    def _norm(self, module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        values = self.values
        if values is None:
            return None
        return gated_norm(inputs[0], values.hidden, module.weight, module.bias, epsilon=module.eps)


def gate_sizes(backbone: Any) -> Gates:
    """Gates of a tower, all open: 1 for every unit, and 0 behind those of layers that have fewer
    than others."""
    layers = list(backbone.encoder.layers)
    heads = [getattr(layer.self_attn, "num_heads", 0) for layer in layers]
    neurons = [getattr(getattr(layer.mlp, "fc1", None), "out_features", 0) for layer in layers]
    return Gates(torch.ones(backbone.config.hidden_size), _present(heads), _present(neurons))


def _present(counts: Sequence[int]) -> Float[Tensor, "layers most"]:
    return (torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]).float()


def gated_norm(
    states: Float[Tensor, "*batch width"],
    gate: Float[Tensor, " width"],
    weight: Float[Tensor, " width"],
    bias: Float[Tensor, " width"],
    *,
    epsilon: float,
) -> Float[Tensor, "*batch width"]:
    """LayerNorm over the channels whose gate is not zero, times the gate.

    The shape does not depend on the gates, so that a pass waits for nothing and compiles once.
    """
    gate = gate.to(states.dtype)
    counted = (gate != 0).to(states.dtype)
    number = counted.sum().clamp_min(1)
    mean = (states * counted).sum(dim=-1, keepdim=True) / number
    centred = (states - mean) * counted
    variance = centred.square().sum(dim=-1, keepdim=True) / number
    return (centred * (variance + epsilon).rsqrt() * weight + bias) * gate


def _before(gate_of: Any, layer: int) -> Any:
    """A hook that scales what a linear layer reads by the gates of its inputs."""

    def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        gated: GatedTower = gate_of.__self__
        values = gated.values
        if values is None:
            return None
        return (inputs[0] * gate_of(values, layer).to(inputs[0].dtype),)

    return hook
