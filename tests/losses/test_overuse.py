"""The penalty on prototypes that everything uses: by its formula, on ranks, in two recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.ranks import run_ranks
from tests.recipes import test_mlcd as mlcd
from tests.recipes import test_protoclip as protoclip
from trainer.comm import Comm
from trainer.errors import ConfigError
from trainer.losses import usage
from trainer.losses.usage import prototype_overuse
from trainer.types import Progress

SOLO = Comm.solo()


def drawn(samples: int = 12, count: int = 7, *, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    options = {"generator": generator, "dtype": torch.float64}
    return torch.randn(samples, dim, **options), torch.randn(count, dim, **options)


def dense(queries: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    used = (scale.detach() * queries @ rows.T).softmax(dim=1).mean(dim=0)
    return len(rows) ** 2 * used.pow(3).sum() / used.sum()


@pytest.mark.parametrize("block", [1, 30, 1 << 25])
def test_value_and_gradients_are_those_of_the_whole_matrix(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "BLOCK_SCORES", block)
    queries, rows = (part.requires_grad_() for part in drawn())
    scale = torch.tensor(3.0).double().requires_grad_()
    valid = torch.tensor([True, True, False, True, True, True, False])
    gradients = []
    for value in (
        prototype_overuse(queries, rows, scale, SOLO, valid=valid),
        dense(queries, rows[valid], scale),
    ):
        gradients.append((value.detach(), *torch.autograd.grad(value, (queries, rows))))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    assert not gradients[0][2][~valid].any()
    assert gradients[0][1].abs().min() > 0
    prototype_overuse(queries, rows, scale, SOLO).backward()
    assert scale.grad is None, "a flatter choice is no way out"


def test_equal_use_costs_one_and_a_single_prototype_the_square_of_their_number() -> None:
    corners = torch.eye(6).double()
    scale = torch.tensor(60.0).double()
    equal = prototype_overuse(corners, corners, scale, SOLO)
    flat = prototype_overuse(torch.zeros(4, 6).double(), corners, scale, SOLO)
    collapsed = prototype_overuse(corners[:1].expand(8, -1), corners, scale, SOLO)
    halves = prototype_overuse(corners[:3], corners, scale, SOLO)
    found = [float(value) for value in (equal, flat, halves, collapsed)]
    assert found == pytest.approx([1, 1, 4, 36])


def share_of(comm: Comm, count: int) -> dict[str, np.ndarray]:
    """As a head calls it: features of all, rows of this rank; gradients of the mean of losses."""
    queries, table = drawn(count=count)
    size = len(queries) // comm.world_size
    mine = queries[comm.rank * size : (comm.rank + 1) * size].clone().requires_grad_()
    rows = table[slice(*comm.row_range(count))].clone().requires_grad_()
    scale = torch.tensor(3.0).double()
    value = prototype_overuse(comm.all_gather(mine), rows, scale, comm)
    value.backward()
    assert mine.grad is not None
    assert rows.grad is not None
    found = {"value": value.detach()[None], "queries": mine.grad, "rows": rows.grad}
    return {
        name: (part if name == "value" else part / comm.world_size).numpy()
        for name, part in found.items()
    }


@pytest.mark.parametrize("count", [3, 7])
def test_one_two_and_four_ranks_find_the_same(count: int) -> None:
    """Of three prototypes on four ranks, one rank has none."""
    alone = share_of(SOLO, count)
    for world_size in (2, 4):
        ranks = run_ranks(share_of, world_size, count, timeout_seconds=200)
        for rank in ranks:
            np.testing.assert_allclose(rank["value"], alone["value"], rtol=1e-12)
        for name in ("queries", "rows"):
            found = np.concatenate([rank[name] for rank in ranks])
            np.testing.assert_allclose(found, alone[name], rtol=1e-10, atol=1e-13)


@pytest.mark.heavy
def test_mlcd_adds_it_and_moves_its_rows_by_it(tmp_path: Path) -> None:
    config = mlcd.changed(mlcd.config_in(tmp_path), *mlcd.WHOLE)
    plain = mlcd.one_loss(config)[0]
    penalised = mlcd.changed(config, "recipe.overuse={weight: 0.5, steps: 4}")
    losses, rows, _, table = mlcd.one_loss(penalised, step=2)
    wanted = dense(normalize(rows), normalize(table), torch.tensor(64.0))
    torch.testing.assert_close(losses["overuse"].double(), wanted, rtol=1e-4, atol=1e-6)
    assert losses.weights["overuse"] == 0.5 / 4
    assert torch.equal(losses["mlcd"], plain["mlcd"])
    gradients = []
    for each in (config, mlcd.changed(config, "recipe.overuse={weight: 0.5}")):
        recipe, stream = mlcd.built(each, SOLO)
        (batch,) = stream.take()
        recipe.losses(recipe.model(batch), batch, 0).total.backward()
        gradients.append(recipe.head._touched.leaf.grad)
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-6


@pytest.mark.heavy
def test_protoclip_adds_it_to_both_terms(tmp_path: Path) -> None:
    recipe, stream = protoclip.built(
        protoclip.config_in(tmp_path, "recipe.overuse={weight: 0.3}"), SOLO
    )
    encode = protoclip.encoder(recipe)
    recipe.begin_phase(Progress(), encode, stream)
    stream.seek(0)
    (batch,) = stream.take()
    features = encode(batch)
    losses = recipe.losses(features, batch, 0)
    for term, table in recipe.episode.tables.items():
        rows = features.tensor(f"{term.student}_projected").double()
        wanted = dense(rows, table.prototypes.double(), features.prototype_scale.double())
        torch.testing.assert_close(
            losses[f"{term.name}_overuse"].double(), wanted, rtol=1e-4, atol=0
        )
        assert losses.weights[f"{term.name}_overuse"] == 0.15


def test_it_is_refused_where_there_is_nothing_that_it_could_be_of(tmp_path: Path) -> None:
    (tmp_path / "mlcd").mkdir()
    config = mlcd.config_in(tmp_path / "mlcd", "recipe.overuse={}")
    for overrides, said in (
        (("recipe.loss=slots", "recipe.negatives=each"), "overuse is of one draw"),
        (("recipe.overuse.weight=0",), "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            mlcd.changed(config, *overrides)
    one = ("recipe.loss=pfc_ce", "recipe.classes=[subgroup]", "recipe.labels_per_sample=1")
    softmax = mlcd.changed(config, *one)
    with pytest.raises(ConfigError, match=r"recipe.overuse"):
        mlcd.renamed(softmax, "partial_fc", "loss", "recipe.overuse={}")
    with pytest.raises(ConfigError, match="prototype_weight: 0 without teachers makes none"):
        protoclip.config_in(tmp_path, "recipe.overuse={}", "recipe.prototype_weight=0")
    with pytest.raises(ConfigError, match=r"recipe.overuse"):
        protoclip.config_in(tmp_path, "recipe.overuse={}", name="clip")
