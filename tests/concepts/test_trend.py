"""Frequency against accuracy: the published figures, scikit-learn's fit, and tables by hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from trainer.concepts.binned import binned
from trainer.concepts.trend import Table, binomial, by_frequency, interval, trend, within_slope
from trainer.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "concept_frequency"
PUBLISHED = os.environ.get("PROTOSCALE_PUBLISHED_TABLES")
"""A folder with the tables that others published, which this project does not copy."""


def golden_files():
    published = (
        sorted(Path(PUBLISHED).glob("concept_frequency/released_*.npz")) if PUBLISHED else []
    )
    return sorted(GOLDEN.glob("*.npz")) + published


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_bins_and_their_correlation_are_those_of_the_published_code(path):
    with np.load(path, allow_pickle=False) as arrays:
        expected = {name: arrays[name] for name in arrays.files}
    found = binned(expected["counts"], expected["accuracy"], num_bins=int(expected["num_bins"]))
    np.testing.assert_allclose(found.log_edges, expected["log_edges"], rtol=1e-12)
    np.testing.assert_array_equal(found.bin_of_concept, expected["bin_of_concept"])
    np.testing.assert_array_equal(found.rows, expected["bin_count"])
    np.testing.assert_allclose(found.mean, expected["bin_mean"], rtol=1e-10)
    np.testing.assert_allclose(found.deviation, expected["bin_std"], rtol=1e-10)
    assert found.rho == pytest.approx(float(expected["rho"]), rel=1e-10)
    assert found.p_value == pytest.approx(float(expected["p_value"]), rel=1e-6)
    table = made_table(expected["counts"], expected["accuracy"])
    raw = trend(table, seed=0, resamples=20)["per_concept"]["pearson"]
    logs = np.log(np.maximum(expected["counts"], 1))
    assert raw == pytest.approx(np.corrcoef(logs, table.accuracy)[0, 1], rel=1e-9)
    assert raw == pytest.approx(float(expected["raw_pearson"]), abs=0.02)


@pytest.mark.skipif(PUBLISHED is None, reason="PROTOSCALE_PUBLISHED_TABLES names no folder")
def test_the_published_bins_have_their_published_sizes():
    with np.load(f"{PUBLISHED}/concept_frequency/released_cc3m_rn50.npz") as arrays:
        found = binned(arrays["counts"], arrays["accuracy"])
    assert found.rows.tolist() == [2640, 81, 116, 128, 224, 345, 391, 260, 170, 75, 29, 10]
    assert found.rho == pytest.approx(0.961, abs=5e-4)


def made_table(counts, accuracy, *, samples=1000, datasets=1):
    names = [f"c{n}" for n in range(len(counts))]
    right = np.round(np.asarray(accuracy) * samples / 100).astype(np.int64)
    sets = [f"set {n % datasets}" for n in range(len(counts))]
    return Table(sets, names, np.asarray(counts), right, np.full(len(counts), samples))


def test_an_empty_bin_is_left_out():
    counts = np.array([0, 2, 4, 30, 900, 1000, 50_000])
    found = binned(counts, np.arange(7.0))
    assert found.rows.sum() == 7
    assert np.isnan(found.mean[found.rows == 0]).all()
    assert np.isfinite(found.rho)


def test_an_exactly_log_linear_table_has_correlation_one_and_its_slope():
    counts = 10 ** np.arange(1, 8)
    found = trend(made_table(counts, 10 + 7 * np.arange(1, 8)), seed=1, resamples=50)
    assert found["per_concept"]["pearson"] == pytest.approx(1)
    assert found["per_concept"]["slope"] == pytest.approx(7)
    assert found["per_concept"]["spearman"] == pytest.approx(1)
    assert found["within_datasets"]["interval"] == pytest.approx([7, 7])


def test_a_level_of_a_data_set_is_no_slope_within_it():
    draw = np.random.default_rng(0)
    counts = np.concatenate([10 ** draw.uniform(1, 2, 50), 10 ** draw.uniform(5, 6, 50)])
    accuracy = np.repeat([20.0, 80.0], 50)
    table = made_table(counts.astype(np.int64), accuracy)._replace(
        dataset=["hard"] * 50 + ["easy"] * 50
    )
    found = trend(table, seed=2, resamples=50)
    assert found["per_concept"]["pearson"] > 0.95
    assert found["within_datasets"]["slope"] == pytest.approx(0, abs=1e-9)


def test_the_binomial_model_is_scikit_learns_without_a_penalty():
    draw = np.random.default_rng(5)
    count = (10 ** draw.uniform(0, 5, 80)).astype(np.int64)
    group = draw.integers(0, 3, 80)
    samples = draw.integers(1, 9, 80)
    chance = 1 / (1 + np.exp(-(0.6 * np.log10(np.maximum(count, 1)) - 1.5 + 0.7 * group)))
    table = Table(
        [f"set {g}" for g in group], [str(n) for n in range(80)],
        count, draw.binomial(samples, chance), samples,
    )  # fmt: skip
    design = np.column_stack([table.decades, np.eye(3)[group]])
    rows = np.concatenate([design, design])
    answers = np.repeat([1, 0], 80)
    weights = np.concatenate([table.right, table.samples - table.right])
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(rows, answers, sample_weight=weights)
    found = binomial(table)
    assert found["slope"] == pytest.approx(fit.coef_[0, 0], rel=1e-4)
    assert 0 < found["standard_error"] < 0.5


@pytest.mark.heavy
def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(60):
        draw = np.random.default_rng(100 + seed)
        count = (10 ** draw.uniform(1, 5, 60)).astype(np.int64)
        accuracy = np.clip(30 + 5 * np.log10(count) + draw.normal(0, 8, 60), 0, 100)
        table = made_table(count, accuracy)
        low, high = interval(table, within_slope, seed=seed, resamples=60)["interval"]
        covered += low <= 5 <= high
    assert covered >= 48  # of 60; 55 are expected of so few concepts and resamples


def test_frequency_zero_stands_apart():
    table = made_table([0, 0, 1, 5, 10, 99, 100], [10, 20, 30, 40, 50, 60, 70])
    found = by_frequency(table)
    assert [row["frequency"] for row in found] == ["0", "1-9", "10-99", "100-999"]
    assert [row["mean_of_concepts"] for row in found] == [15, 35, 55, 70]
    assert [row["rows"] for row in found] == [2, 2, 2, 1]
    figures = trend(table, seed=0, resamples=20)
    assert figures["zero_frequency"]["mean_of_concepts"] == 15
    assert figures["per_concept_without_zero"]["rows"] == 5


def test_two_concepts_are_too_few():
    with pytest.raises(DataError, match="2 concepts have both a frequency and an accuracy"):
        trend(made_table([1, 2], [1, 2]), seed=0)
