"""The benchmark of prototype logits compares sides that compute the same."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from trainer.bench import head_step, prototype_logits_worker
from trainer.bench.head_step import HeadCase
from trainer.bench.memory import peak_resident_bytes
from trainer.bench.prototype_logits import LogitsCase
from trainer.bench.prototype_logits_plot import plot
from trainer.bench.prototype_logits_worker import Lap, measure, naive, ours, problem
from trainer.comm import Comm

CASE = LogitsCase(batch=20, prototypes=300, dim=16, rounds=1, sides=("ours", "naive"))


def test_ours_and_naive_return_the_same_loss_and_gradients():
    features, rows, labels = (t for t in problem(CASE, torch.device("cpu")))
    for backward in (False, True):
        found = ours(features.double(), rows.double(), labels, backward)
        expected = naive(features.double(), rows.double(), labels, backward)
        for value, other in zip(found, expected, strict=True):
            assert (value is None) == (other is None) == (not backward and value is None)
            if value is not None:
                torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.heavy
def test_rows_name_shape_pass_time_and_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(prototype_logits_worker, "_sgemm_peak", lambda device: Lap(1e-11, 1e-11))
    rows = measure(CASE)
    assert [(r["name"], r["pass"]) for r in rows] == [
        ("ours", "forward"),
        ("naive", "forward"),
        ("ours", "forward+backward"),
        ("naive", "forward+backward"),
    ]
    for row in rows:
        assert {"batch", "prototypes", "dim", "threads"} <= row.keys()
        assert row["seconds"] > 0
        assert row["extra_bytes"] >= 0
    plot(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


@pytest.mark.heavy
def test_a_matrix_that_is_too_large_and_a_package_that_is_absent_are_said_so(monkeypatch):
    monkeypatch.setattr(prototype_logits_worker, "_sgemm_peak", lambda device: Lap(1e-11, 1e-11))
    monkeypatch.setitem(__import__("sys").modules, "cut_cross_entropy", None)
    case = CASE.model_copy(update={"most_logit_bytes": 1000, "sides": ("naive", "cce")})
    reasons = {(row["name"], row["why"]) for row in measure(case)}
    assert reasons == {("naive", "the matrix of logits is too large"), ("cce", "not installed")}


def test_resident_peak_sees_what_is_freed_again():
    size = 64 << 20
    found = peak_resident_bytes(lambda: torch.ones(size // 4).sum())
    assert size * 0.9 < found < size * 1.5


def test_both_heads_take_the_same_first_step_on_any_number_of_ranks():
    case = HeadCase(prototypes=50, dim=8, batch=12, labels=2, sample_rate=0.3, rounds=1)
    alone = head_step.measure(case, Comm.solo())
    assert [row["name"] for row in alone] == ["row-sparse", "dense"]
    for row in alone:
        assert row["cpu_seconds"] > row["update_cpu_seconds"] > 0
    for ranks in run_ranks(measure_head, 2, case.model_dump()):
        for row, other in zip(ranks, alone, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


def measure_head(comm: Comm, case: dict) -> list[dict]:
    return head_step.measure(HeadCase(**case), comm)
