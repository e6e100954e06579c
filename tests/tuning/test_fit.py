"""Training on stored features: naive loops, one rank or several, and what is refused."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.cluster.stores import write_store
from tests.fixtures.emoji import write_shards
from tests.tuning.store_cases import CLASSES, made_store, opened
from tools import tune as tool
from trainer.comm import Comm
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.hashing import hash_bits, key_of, permutation, uniform
from trainer.tuning.features import UNKNOWN, LabelledStore, Standard, open_labelled
from trainer.tuning.fit import PRESETS, TuneConfig, Tuned, tune
from trainer.tuning.measure import accuracy, logistic, tuned_classify

SOLO = Comm.solo()


def test_an_mlp_without_terms_is_the_naive_loop(tmp_path):
    data = opened(made_store(tmp_path / "store"))
    config = TuneConfig(epochs=2, batch=20)
    found = tune(data, config, seed=3, comm=SOLO)
    expected = naive_mlp(data, config, seed=3)
    rows = torch.arange(12)
    standard = Standard.of(data, SOLO)
    with torch.no_grad():
        torch.testing.assert_close(
            tuned_classify(found, SOLO)(data.clean(rows)), expected(standard(data.clean(rows)))
        )


def naive_mlp(data, config, *, seed):
    """The same start, in torch's own modules, on the same rows."""
    torch.manual_seed(key_of(seed, "tuning") & ((1 << 63) - 1))
    standard = Standard.of(data, SOLO)
    start = Tuned(config, standard, CLASSES)
    adapter = start.adapter
    inner = nn.Sequential(
        adapter.inner, nn.BatchNorm1d(adapter.inner.out_features), nn.ReLU(), adapter.outer
    )
    head, scale = start.head, adapter.scale
    parameters = [p for p in (*inner.parameters(), *head.parameters(), scale) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-4)
    total, step = config.epochs * math.ceil(len(data.ids) / config.batch), 0
    for epoch in range(config.epochs):
        order = permutation(len(data.ids), key_of(seed, "tuning order", epoch))
        for rows in order.tensor_split(math.ceil(len(order) / config.batch)):
            key, ids = key_of(seed, "tuning views", epoch), data.ids[rows]
            first = (uniform(ids, key) * 3).long()
            second = (first + 1 + (uniform(hash_bits(ids, key), key) * 2).long()) % 3
            assert (first != second).all()
            vectors = data.store.vectors(ids)
            each = torch.arange(len(ids))
            pair = torch.cat([vectors[each, 1 + first], vectors[each, 1 + second]])
            frozen = standard(pair)
            logits = head(scale * inner(frozen) + frozen)
            optimizer.zero_grad()
            F.cross_entropy(logits, data.labels[rows].repeat(2)).backward()
            optimizer.param_groups[0]["lr"] = (
                config.learning_rate * (1 + math.cos(math.pi * step / total)) / 2
            )
            optimizer.step()
            step += 1
    inner.eval()
    return lambda rows: head(scale * inner(rows) + rows)


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["linear", "mlp", "paper", "repo"])
def test_classes_that_a_plane_separates_are_learnt_whole(tmp_path, method):
    data = opened(made_store(tmp_path / "store"))
    config = PRESETS[method].model_copy(update={"batch": 8, "learning_rate": 1e-2})
    model = tune(data, config, seed=0, comm=SOLO)
    assert accuracy(tuned_classify(model, SOLO), data, SOLO) == 100.0


def test_logistic_regression_separates_them_too(tmp_path):
    data = opened(made_store(tmp_path / "store"))
    classify, penalty = logistic(data, seed=1, comm=SOLO)
    assert accuracy(classify, data, SOLO) == 100.0
    assert penalty > 0


def test_a_constant_feature_stays_zero(tmp_path):
    rows = torch.randn(10, 4)
    rows[:, 2] = 0.5
    store = write_store(tmp_path / "s", rows, torch.arange(10), sizes=[10])
    data = LabelledStore(store, torch.arange(10), torch.zeros(10).long(), ("a",))
    standard = Standard.of(data, SOLO)
    found = standard(data.clean(torch.arange(10)))
    assert found[:, 2].abs().max() < 0.1
    torch.testing.assert_close(found[:, 0].std(correction=0), torch.tensor(1.0))


def test_an_mlp_needs_views(tmp_path):
    store = write_store(tmp_path / "s", torch.randn(10, 4), torch.arange(10), sizes=[10])
    data = LabelledStore(store, torch.arange(10), torch.arange(10) % 2, ("a", "b"))
    with pytest.raises(ConfigError, match=r"has 1 vectors a sample.*--views 4"):
        tune(data, PRESETS["repo"], seed=0, comm=SOLO)
    tune(data, PRESETS["linear"].model_copy(update={"epochs": 1}), seed=0, comm=SOLO)


def test_samples_and_classes_meet_by_id_and_never_by_position(tmp_path):
    spec = write_shards(tmp_path / "shards", count=30, per_shard=10)
    ids = torch.from_numpy(ShardSet.open(spec).ids.copy())
    turned = ids.flip(0)
    folder = tmp_path / "store"
    write_store(folder, torch.arange(30.0)[:, None].repeat(1, 4), turned, sizes=[30])
    data = open_labelled(folder, spec, "subgroup", SOLO)
    assert data.ids.tolist() == ids.tolist()
    assert data.clean(torch.arange(30))[:, 0].tolist() == list(reversed(range(30)))
    fewer = open_labelled(folder, spec, "subgroup", SOLO, names=data.names[:1])
    assert (fewer.labels == UNKNOWN).sum() == (data.labels != 0).sum()
    assert accuracy(lambda rows: torch.zeros(len(rows), 1), fewer, SOLO) == pytest.approx(
        100 * float((data.labels == 0).float().mean())
    )
    with pytest.raises(DataError, match="has a class under 'colour'"):
        open_labelled(folder, spec, "colour", SOLO)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--test", "a"], "not NAME=SHARDS"),
        (["--test", "train=x"], "the name is taken"),
        (["--test", "a=x", "--test", "a=y"], "the name is taken"),
        (["--test", "a=x", "--features", "f", "--seeds", "0"], "at least 1"),
        (["--test", "a=x"], "give --model, whose features are computed, or --features"),
    ],
)
def test_a_wrong_command_is_one_sentence(monkeypatch, tmp_path, arguments, reason):
    given = ["--train", "x", "--target", "concept", "--out", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", ["tune.py", *given])
    monkeypatch.setattr(tool.Comm, "from_environment", tool.Comm.solo)
    with pytest.raises(ConfigError, match=reason):
        tool.main()
