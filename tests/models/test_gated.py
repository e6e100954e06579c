"""Towers with gates: open ones change nothing, hard ones are the smaller tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.small import LENGTH, small_batch, small_config, word_tokenizer
from trainer.errors import ConfigError
from trainer.losses.sparse_gates import Gates
from trainer.models.config import TwoTowerConfig
from trainer.models.gated import GatedTower, gated_norm
from trainer.models.load import image_tower, text_tower
from trainer.models.narrow import NarrowShape, narrow
from trainer.models.tower import Tower
from trainer.models.two_tower import seeded
from trainer.parts.inheritance import Units, kept_places
from trainer.recipes.tinyclip import open_units


def tower_of(kind: str, **sizes: int) -> Tower:
    section = {"width": 32, "layers": 3, "heads": 4, "mlp_width": 24} | sizes
    config = TwoTowerConfig.model_validate(small_config(**{kind: section}))
    with seeded(0, kind):
        tower = image_tower(config) if kind == "image" else text_tower(config, word_tokenizer())
        for parameter in tower.parameters():  # biases and norms too, so that nothing hides
            torch.nn.init.normal_(parameter, std=0.3)
    return tower.eval()


def said(tower: Tower, kind: str) -> Tensor:
    batch = small_batch()
    assert batch.tokens is not None
    assert batch.token_mask is not None
    with torch.no_grad():
        return (
            tower.images(batch.images)
            if kind == "image"
            else tower.texts(batch.tokens, batch.token_mask)
        )


HARD = Gates(
    (torch.arange(32) % 3 != 0).float(),
    torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]),
    torch.stack([(torch.arange(24) % 2 == 0).float(), torch.ones(24), torch.zeros(24)]),
)
"""A layer without a head, and one without a neuron."""


@pytest.mark.parametrize("kind", ["image", "text"])
def test_open_gates_change_nothing(kind: str) -> None:
    plain, gated = tower_of(kind), tower_of(kind)
    values = GatedTower(gated)
    assert torch.equal(said(gated, kind), said(plain, kind))
    values.final = values.sizes
    torch.testing.assert_close(said(gated, kind), said(plain, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_hard_gates_are_the_smaller_tower(kind: str) -> None:
    """A layer without heads, and one without neurons, keep their bias."""
    large = tower_of(kind)
    weights = {name: value.detach().clone() for name, value in large.named_parameters()}
    units = Units(
        [0, 1, 2],
        HARD.hidden.nonzero().squeeze(1),
        [row.nonzero().squeeze(1) for row in HARD.heads],
        [row.nonzero().squeeze(1) for row in HARD.neurons],
    )
    small = tower_of(kind, width=len(units.hidden), heads=1, mlp_width=24)
    shape = NarrowShape(
        len(units.hidden), 8, tuple(map(len, units.heads)), tuple(map(len, units.neurons))
    )
    narrow(small, shape)
    for name, value in small.named_parameters():
        kept = kept_places(name, units, head_dim=8)
        value.data.copy_(kept.of(weights[kept.name]))
    GatedTower(large).final = HARD
    torch.testing.assert_close(said(small, kind), said(large, kind), rtol=1e-5, atol=1e-5)
    counted = sum(p.numel() for n, p in small.named_parameters() if n.endswith("proj.weight"))
    assert counted == sum(4 * 8 * len(heads) * len(units.hidden) for heads in units.heads)


def test_a_gated_norm_is_the_norm_of_the_open_channels() -> None:
    states = torch.randn(2, 5, 12, dtype=torch.float64)
    weight, bias = torch.randn(2, 12, dtype=torch.float64)
    gate = torch.tensor([1.0, 0, 0.5] * 4, dtype=torch.float64)
    some = gate.nonzero().squeeze(1)
    wanted = torch.zeros_like(states)
    wanted[..., some] = gate[some] * torch.nn.functional.layer_norm(
        states[..., some], (len(some),), weight[some], bias[some], eps=1e-5
    )
    found = gated_norm(states, gate, weight, bias, epsilon=1e-5)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_gates_have_gradients_with_checkpointing_too(kind: str) -> None:
    batch, found = small_batch(), []
    assert batch.tokens is not None
    assert batch.token_mask is not None
    for enabled in (False, True):
        tower = tower_of(kind).train()
        tower.gradient_checkpointing(enabled)
        gated = GatedTower(tower)
        gated.drawn = Gates(*(part.clone().requires_grad_() for part in gated.sizes))
        rows = (
            tower.images(batch.images)
            if kind == "image"
            else tower.texts(batch.tokens, batch.token_mask)
        )
        rows.square().sum().backward()
        assert all(part.grad.abs().sum() > 0 for part in gated.drawn)
        found.append([part.grad for part in gated.drawn])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_other_towers_are_refused(saved: dict[str, str]) -> None:
    values = {"text": {"path": saved["bert"]}, "text_length": LENGTH}
    tower = text_tower(small_config(**values), word_tokenizer())
    with pytest.raises(ConfigError, match="gates are for CLIP's towers, not for a BertModel"):
        GatedTower(tower)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_cut_tower_that_is_saved_loaded_and_cut_again_is_itself(
    kind: str, tmp_path: Path
) -> None:
    """With gates that are 1 or 0: no weight is multiplied twice, and open gates cut nothing."""
    large = tower_of(kind)
    once = cut(dict(large.named_parameters()), HARD, kind)
    save_file({name: value.contiguous() for name, value in once.items()}, tmp_path / "cut")
    loaded = load_file(tmp_path / "cut")
    open_gates = Gates(
        torch.ones(int(HARD.hidden.sum())),
        HARD.heads.sort(dim=1, descending=True).values,
        HARD.neurons.sort(dim=1, descending=True).values,
    )
    twice = cut(loaded, open_gates, kind)
    assert once.keys() == twice.keys()
    assert all(torch.equal(twice[name], once[name]) for name in once)
    assert sum(map(torch.numel, once.values())) < sum(p.numel() for p in large.parameters())


def cut(weights: Mapping[str, Tensor], gates: Gates, kind: str) -> dict[str, Tensor]:
    """What a cut keeps of these weights, under the names of the smaller tower."""
    units = open_units(gates)
    small = tower_of(kind, width=len(units.hidden), heads=1, mlp_width=24)
    shape = NarrowShape(
        len(units.hidden), 8, tuple(map(len, units.heads)), tuple(map(len, units.neurons))
    )
    narrow(small, shape)
    kept = {name: kept_places(name, units, head_dim=8) for name, _ in small.named_parameters()}
    found = {name: place.of(weights[place.name].detach()) for name, place in kept.items()}
    for name, value in small.named_parameters():
        assert found[name].shape == value.shape
    return found
