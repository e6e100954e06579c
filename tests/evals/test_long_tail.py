"""Accuracy by frequency: slices add up to zero-shot's accuracy, and names must meet."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.evals.rank_cases import setting
from tests.fixtures.emoji import write_shards
from trainer.comm import Comm
from trainer.concepts import Bank, Counts
from trainer.concepts.count import Captions, count_shards
from trainer.config import EvalConfig
from trainer.errors import DataError
from trainer.evals import run_eval
from trainer.evals.long_tail import slice_of
from trainer.programs.concepts import class_bank

SOLO = Comm.solo()


def test_slices_add_up_to_the_accuracy_of_zero_shot(tmp_path):
    spec = write_shards(tmp_path / "data", count=80, per_shard=40)
    bank = class_bank(spec, "group")
    model, context = setting(SOLO, spec)
    folder = tmp_path / "counts"
    counts = Counts.none(source="here", languages=["en"], num_concepts=len(bank))
    counts.any_text[:] = [0, 3, 30][: len(bank)] + [300] * max(0, len(bank) - 3)
    bank.save(folder / "bank.jsonl")
    counts.save(folder / "counts.safetensors")
    one = {"data": spec, "target": "group", "templates": ("{}",)}
    sliced = EvalConfig(name="long_tail", label="a", concepts=folder, slices=(10, 100), **one)
    found = run_eval(sliced, model, context)
    whole = run_eval(EvalConfig(name="zero_shot", label="b", **one), model, context)
    assert found["top1"] == pytest.approx(whole["top1"])
    assert found["mean_per_class"] == pytest.approx(whole["mean_per_class"])
    names = [name.partition("/")[2] for name in found if name.startswith("top1/")]
    assert names[:2] == ["unseen", "tail"]
    total = sum(found[f"top1/{name}"] * found[f"samples/{name}"] for name in names)
    assert total / 80 == pytest.approx(found["top1"])
    assert sum(found[f"classes/{name}"] for name in names) == len(bank)
    missing = EvalConfig(name="long_tail", label="a", concepts=folder, data=spec, target="name")
    with pytest.raises(DataError, match="has no count of"):
        run_eval(missing, model, context)


def test_counts_of_shards_are_what_it_reads(tmp_path):
    spec = write_shards(tmp_path / "data", count=30, per_shard=30)
    folder = tmp_path / "counts"
    count_shards(spec, class_bank(spec, "group"), Captions({"en": "txt"}, {}), folder, SOLO)
    model, context = setting(SOLO, spec)
    config = EvalConfig(name="long_tail", label="a", concepts=folder, data=spec, target="group")
    figures = run_eval(config, model, context)
    assert 0 <= figures["worst_tenth_of_classes"] <= figures["mean_per_class"]
    Bank.of_names(["one"]).save(folder / "bank.jsonl")
    with pytest.raises(DataError, match="a bank of 1; count anew"):
        run_eval(config, model, context)


def test_a_slice_begins_at_its_frequency():
    assert [slice_of(n, (10, 100)) for n in (0, 1, 9, 10, 99, 100)] == [
        *("unseen", "tail", "tail", "torso", "torso", "head")
    ]


def test_what_long_tail_needs_is_asked_for():
    with pytest.raises(ValidationError, match="long_tail needs `concepts`"):
        EvalConfig(name="long_tail", label="a", data="x")
    with pytest.raises(ValidationError, match="must ascend"):
        EvalConfig(name="long_tail", label="a", data="x", concepts="c", slices=(5, 5))
    with pytest.raises(ValidationError, match="concepts is not read where name is zero_shot"):
        EvalConfig(name="zero_shot", label="a", data="x", concepts="c")
