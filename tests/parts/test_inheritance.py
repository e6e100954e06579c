"""Smaller towers out of larger ones, against TinyCLIP's published code and transformers itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from tests.losses.rank_cases import golden
from trainer.errors import ConfigError
from trainer.parts.inheritance import Sizes, inherit, inherited_units, kept_places, layer_map

OURS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
}


def read(side: str) -> dict[str, Tensor]:
    """The arrays of one side under transformers' names, projections apart."""
    found: dict[str, Tensor] = {}
    for key, value in golden("tinyclip/manual_inherit.npz").items():
        if not key.startswith(f"{side}__"):
            continue
        name, tensor = key.removeprefix(f"{side}__").replace("__", "."), torch.from_numpy(value)
        for theirs, ours in OURS.items():
            name = name.replace(theirs, ours)
        if "in_proj" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                end = f"self_attn.{part}_proj.{name.rpartition('_')[2]}"
                found[name.replace(f"attn.in_proj_{name.rpartition('_')[2]}", end)] = rows
        elif name == "positional_embedding":
            found["embeddings.position_embedding.weight"] = tensor
        elif name == "text_projection":
            found["projection.weight"] = tensor.T
        else:
            found[name] = tensor
    return found


def test_layers_and_leading_slices_are_the_published_ones() -> None:
    given = golden("tinyclip/manual_inherit.npz")
    for teacher, student, wanted in zip(
        given["depth_teacher"], given["depth_student"], given["layer_map"], strict=True
    ):
        assert layer_map(int(teacher), int(student)) == [i for i in wanted.tolist() if i >= 0]
    sizes = [
        Sizes(*(int(given[f"{side}_{key}"]) for key in ("layers", "width", "heads")), neurons=count)
        for side, count in (("teacher", 32), ("student", 16))
    ]
    head_dim, wanted = int(given["head_dim"]), read("student")
    units = inherited_units(*sizes, head_dim=head_dim)
    ours = inherit(read("teacher"), list(wanted), units, head_dim=head_dim)
    assert len(wanted) == 2 * 11 + 3
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def model(kind: str, *, width: int = 32, layers: int = 4, heads: int = 4, neurons: int = 64):
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": neurons,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width + layers)
        if kind == "image":
            return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).eval()
        words = {"vocab_size": 60, "max_position_embeddings": 9}
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        return CLIPTextModel(CLIPTextConfig(**sizes, **words, **ends)).eval()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_equal_sizes_are_copied_and_every_parameter_is_known(kind: str) -> None:
    weights = dict(model(kind).named_parameters())
    for chosen in (None, weights):
        sizes = Sizes(4, 32, 4, 64)
        units = inherited_units(sizes, sizes, weights=chosen, head_dim=8)
        copies = inherit(weights, list(weights), units, head_dim=8)
        assert all(torch.equal(copies[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_units_without_weight_go_first_and_nothing_changes(kind: str) -> None:
    """Heads and neurons that say nothing are left out by magnitude, and the output stays."""
    large = model(kind)
    silent_heads, silent_neurons = torch.tensor([0, 2]), torch.arange(0, 64, 2)
    rows = (silent_heads[:, None] * 8 + torch.arange(8)).flatten()
    with torch.no_grad():
        for layer in large.encoder.layers:
            for part in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, part).weight[rows] = 0
                getattr(layer.self_attn, part).bias[rows] = 0
            layer.self_attn.out_proj.weight[:, rows] = 0
            layer.mlp.fc1.weight[silent_neurons] = 0
            layer.mlp.fc1.bias[silent_neurons] = 0
            layer.mlp.fc2.weight[:, silent_neurons] = 0
    weights = dict(large.named_parameters())
    teacher, student = Sizes(4, 32, 4, 64), Sizes(4, 32, 2, 32)
    units = inherited_units(teacher, student, weights=weights, head_dim=8)
    assert all(torch.equal(heads, torch.tensor([1, 3])) for heads in units.heads)
    assert all(torch.equal(neurons, torch.arange(1, 64, 2)) for neurons in units.neurons)
    smaller = inherit(weights, list(weights), units, head_dim=8)
    # CLIP's attention takes the number of heads from its width, so its sums are made by hand.
    states = torch.randn(2, 5, 32)
    layer = large.encoder.layers[1]
    with torch.no_grad():
        hidden = layer.mlp.activation_fn(
            states @ smaller["encoder.layers.1.mlp.fc1.weight"].T
            + smaller["encoder.layers.1.mlp.fc1.bias"]
        )
        found = (
            hidden @ smaller["encoder.layers.1.mlp.fc2.weight"].T
            + smaller["encoder.layers.1.mlp.fc2.bias"]
        )
        torch.testing.assert_close(found, layer.mlp(states), rtol=1e-5, atol=1e-6)
    assert smaller["encoder.layers.1.self_attn.q_proj.weight"].shape == (16, 32)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_smaller_model_of_transformers_loads_what_it_inherits(kind: str) -> None:
    large, small = model(kind), model(kind, width=16, layers=2, heads=2, neurons=32)
    units = inherited_units(Sizes(4, 32, 4, 64), Sizes(2, 16, 2, 32), head_dim=8)
    names = [name for name, _ in small.named_parameters()]
    weights = dict(large.named_parameters())
    small.load_state_dict(inherit(weights, names, units, head_dim=8), strict=False)
    attention = small.encoder.layers[1].self_attn
    for part in ("q_proj", "k_proj", "v_proj"):
        old = getattr(large.encoder.layers[2].self_attn, part).weight
        assert torch.equal(getattr(attention, part).weight, old[:16, :16])
    kept = kept_places("image.backbone.encoder.layers.1.mlp.fc2.weight", units, head_dim=8)
    assert kept.name == "image.backbone.encoder.layers.2.mlp.fc2.weight"
    assert {dim: len(ids) for dim, ids in kept.places.items()} == {0: 16, 1: 32}


def test_what_can_not_be_inherited_in_one_sentence() -> None:
    small, large = Sizes(2, 16, 2, 32), Sizes(4, 32, 4, 64)
    with pytest.raises(ConfigError, match="layers=4 can't inherit from one with 2"):
        inherited_units(small, large, head_dim=8)
    with pytest.raises(ConfigError, match="only CLIP's towers shrink"):
        kept_places("model.layers.0.mlp.up_proj.weight", inherited_units(large, small, head_dim=8),
                    head_dim=8)  # fmt: skip
    with pytest.raises(ConfigError, match="both must be CLIP's"):
        inherit({}, ["pre_layrnorm.weight"], inherited_units(large, small, head_dim=8), head_dim=8)
