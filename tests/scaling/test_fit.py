"""Laws found again where they are known, and published figures from published points."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from tests.scaling.made import along_compute, grid
from trainer.errors import ConfigError, DataError
from trainer.scaling.fit import fit, held_out
from trainer.scaling.forms import Form, inputs
from trainer.scaling.points import Point, columns, read_points
from trainer.scaling.published import binned_power_law, power_law

GOLDEN = Path(__file__).parents[1] / "golden" / "scaling_law"
PUBLISHED = os.environ.get("PROTOSCALE_PUBLISHED_TABLES")
"""A folder with the tables that others published, which this project does not copy."""
needs_published = pytest.mark.skipif(
    PUBLISHED is None, reason="PROTOSCALE_PUBLISHED_TABLES names no folder"
)


def golden_files():
    published = sorted(Path(PUBLISHED).glob("scaling_law/released_*.npz")) if PUBLISHED else []
    return sorted(GOLDEN.glob("*.npz")) + published


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_the_binned_law_is_that_of_the_published_code(path):
    """Empty bins among them."""
    with np.load(path, allow_pickle=False) as arrays:
        expected = {name: arrays[name] for name in arrays.files}
    compute, error = (expected[f"{name}_openclip"] for name in ("compute_gmac", "error"))
    law = binned_power_law(compute, error, num_bins=int(expected["num_bins"]))
    assert law.alpha == pytest.approx(float(expected["alpha"]), abs=1e-9)
    assert law.beta == pytest.approx(float(expected["beta"]), rel=1e-9)
    grid_of = expected.get("predict_compute_gmac", compute)
    if "predicted_error" in expected:
        np.testing.assert_allclose(law(grid_of), expected["predicted_error"], rtol=1e-9)
    in_flop = binned_power_law(compute * 6e9, error, num_bins=int(expected["num_bins"]))
    assert in_flop.alpha == pytest.approx(law.alpha, abs=1e-9)
    np.testing.assert_allclose(in_flop(grid_of * 6e9), law(grid_of), rtol=1e-9)
    if "alpha_openai" in expected:
        plain = power_law(expected["compute_gmac_openai"], expected["error_openai"])
        assert plain.alpha == pytest.approx(float(expected["alpha_openai"]), abs=1e-9)
        assert plain.beta == pytest.approx(float(expected["beta_openai"]), rel=1e-9)


@needs_published
def test_the_published_prediction_of_a_larger_model_comes_out():
    with np.load(f"{PUBLISHED}/scaling_law/released_imagenet1k.npz") as arrays:
        compute, error = arrays["compute_gmac_openclip"], arrays["error_openclip"]
    law = binned_power_law(compute, error)
    assert round(law.alpha, 4) == -0.1114
    assert round(law.beta, 3) == 5.858
    assert round(100 * float(1 - law(190.97 * 407_332_084 * 32)), 4) == 75.6233
    rows = [
        Point(run=str(at), error=float(e), compute=float(c))
        for at, (c, e) in enumerate(zip(compute, error, strict=True))
    ]
    frontier = fit(columns(rows), "power", frontier="pareto", delta=1.0, resamples=200)
    assert int(frontier.weight.sum()) == 10
    assert frontier.numbers["alpha"] == pytest.approx(-0.1110, abs=5e-5)
    assert frontier.numbers["beta"] == pytest.approx(5.88, abs=5e-3)


def published_points():
    with open(f"{PUBLISHED}/scaling_law/parametric_fit_points.csv", newline="") as file:
        rows = [
            {
                name: float(text.removeprefix("np.float64(").rstrip(")"))
                for name, text in row.items()
            }
            for row in csv.DictReader(file)
        ]
    rows.sort(key=lambda row: row["loss"])
    return columns(
        Point(
            run=str(at),
            error=row["loss"],
            compute=row["training_flop"],
            parameters=row["model_size"],
            samples=row["training_flop"] / 6 / row["model_size"],
        )
        for at, row in enumerate(rows[:-5])
    )


@needs_published
@pytest.mark.heavy
def test_the_published_parametric_fit_comes_out_with_its_intervals():
    """The valley is flat, so numbers are held against their published standard errors."""
    law = fit(published_points(), "parametric", delta=1e-3, resamples=500)
    assert law.objective <= 0.0010183
    told = {
        "A": (482.006, 124.52),
        "B": (2085.43, 1293.28),
        "floor": (1.8169, 0.0257),
        "alpha_n": (0.34781, 0.0154),
        "alpha_d": (0.36585, 0.0206),
    }
    for name, (value, deviation) in told.items():
        assert law.numbers[name] == pytest.approx(value, abs=deviation / 10), name
    ends = {"floor": (1.769, 1.871), "alpha_n": (0.317, 0.373), "alpha_d": (0.331, 0.415)}
    for name, limits in ends.items():
        near = pytest.approx(limits, abs=told[name][1] / 3)
        assert law.intervals[name] == near, name


KNOWN = {
    "power": ({"alpha": -0.11, "beta": 50.0}, lambda c: 50.0 * c**-0.11),
    "floor": (
        {"alpha": -0.2, "beta": 900.0, "floor": 0.12},
        lambda c: 0.12 + 900.0 * c**-0.2,
    ),
    "shifted": (
        {"alpha": -0.3, "beta": 2e4, "floor": 0.05, "shift": 3e16},
        lambda c: 0.05 + 2e4 * (c + 3e16) ** -0.3,
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("form", KNOWN)
def test_a_law_in_compute_without_noise_is_found_again(form):
    numbers, error_of = KNOWN[form]
    law = fit(along_compute(error_of), form, resamples=20)
    for name, value in numbers.items():
        assert law.numbers[name] == pytest.approx(value, rel=1e-6), name


def half_life_of(tau):
    def error_of(n, d, own):
        worth = np.log(min(d, own))
        begun = 1
        while begun < d / own:
            reached = min(begun + 1, d / own)
            worth += 2.0 ** (-begun / tau) * np.log(reached / begun)
            begun += 1
        return 0.1 + 40 / n**0.3 + 300 * np.exp(-0.4 * worth)

    return error_of


@pytest.mark.parametrize("form", ["parametric", "repeated"])
def test_a_law_in_parameters_and_samples_without_noise_is_found_again(form):
    """Repeated samples by a plain loop over the passes."""
    numbers = {"alpha_n": 0.3, "A": 40.0, "alpha_d": 0.4, "B": 300.0, "floor": 0.1}
    if form == "repeated":
        numbers["half_life"] = 4.0
        table = grid(half_life_of(4.0), lengths=5, unique=[1e8, 1e9])
    else:
        table = grid(lambda n, d, own: 0.1 + 40 / n**0.3 + 300 / d**0.4)
    law = fit(table, form, resamples=4)
    for name, value in numbers.items():
        assert law.numbers[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["floor", "shifted"])
def test_a_power_law_is_a_law_with_a_floor_of_zero(form):
    law = fit(along_compute(KNOWN["power"][1]), form, resamples=10)
    assert law.numbers["floor"] == 0.0
    assert law.numbers["alpha"] == pytest.approx(-0.11, rel=1e-6)
    noisy = along_compute(KNOWN["power"][1], noise=0.02, seed=3)
    plain, floored = (fit(noisy, name, resamples=10) for name in ("power", form))
    assert floored.objective <= plain.objective * (1 + 1e-9)


def test_repeated_samples_that_never_tire_are_fresh_ones():
    table = grid(half_life_of(4.0), lengths=4, unique=[1e8])
    x = inputs(table)
    free = np.array([[0.1, -1.0, 0.2, -0.9, -2.0]])
    fresh, _ = Form("parametric").log_error(free, x)
    again, _ = Form("repeated").log_error(np.append(free, [[40.0]], axis=1), x)
    np.testing.assert_allclose(again, fresh, rtol=1e-12)


@pytest.mark.parametrize("form", ["power", "floor", "shifted", "parametric", "repeated"])
def test_derivatives_of_each_law_are_those_of_small_differences(form):
    table = grid(half_life_of(4.0), sizes=3, lengths=3, unique=[1e8])
    law, x = Form(form), inputs(table)
    free = np.random.default_rng(1).normal(-0.5, 0.3, (2, len(law.numbers)))
    _, slope = law.log_error(free, x)
    for place in range(free.shape[1]):
        step = np.zeros(free.shape[1])
        step[place] = 1e-6
        above, below = (law.log_error(free + sign * step, x)[0] for sign in (1, -1))
        np.testing.assert_allclose(slope[:, :, place], (above - below) / 2e-6, atol=1e-7)


def test_a_run_that_another_one_dominates_changes_no_frontier_and_no_law():
    table = along_compute(KNOWN["power"][1], noise=0.005, seed=1)
    for frontier in ("pareto", "log2_bins"):
        before = fit(table, "power", frontier=frontier, resamples=5)
        best = np.flatnonzero(before.weight)[3]
        worse = Point(
            run="worse", error=table.error[best] * 1.2, compute=table.compute[best] * 1.01
        )
        after = fit(columns([*table.rows, worse]), "power", frontier=frontier, resamples=5)
        assert after.numbers == pytest.approx(before.numbers, rel=1e-9)
        assert after.weight.sum() == before.weight.sum()


@pytest.mark.heavy
def test_units_of_compute_change_neither_exponent_nor_prediction():
    table = along_compute(KNOWN["floor"][1], noise=0.01)
    other = columns(row.model_copy(update={"compute": row.compute / 6e9}) for row in table.rows)
    first, second = (fit(points, "floor", resamples=30) for points in (table, other))
    assert second.numbers["alpha"] == pytest.approx(first.numbers["alpha"], rel=1e-6)
    assert second.intervals["alpha"] == pytest.approx(first.intervals["alpha"], rel=1e-3)
    np.testing.assert_allclose(first.predicted(table)[0], second.predicted(other)[0], rtol=1e-7)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("form", "frontier", "draws"),
    [
        ("power", "pareto", 25),
        pytest.param("power", "all", 100, marks=pytest.mark.slow),
        pytest.param("power", "pareto", 100, marks=pytest.mark.slow),
        pytest.param("power", "log2_bins", 100, marks=pytest.mark.slow),
        pytest.param("floor", "all", 100, marks=pytest.mark.slow),
    ],
)
def test_95_of_100_intervals_hold_the_exponent_under_noise_of_2_percent(form, frontier, draws):
    """To two standard errors of so many draws. Of a frontier too, which is chosen anew in each."""
    numbers, error_of = KNOWN[form]
    held = 0
    for seed in range(1000, 1000 + draws):
        table = along_compute(error_of, noise=0.02, seed=seed, count=60)
        law = fit(table, form, frontier=frontier, resamples=200, seed=seed)
        low, high = law.intervals["alpha"]
        held += low <= numbers["alpha"] <= high
    assert held >= 0.95 * draws - 2 * (0.95 * 0.05 * draws) ** 0.5, held


def test_the_last_decade_is_predicted_from_the_others():
    table = along_compute(KNOWN["power"][1], noise=0.01, count=36)
    found = held_out(table, "power", resamples=100)
    assert found is not None
    assert found.law.points.compute.max() <= table.compute.max() / 10
    assert found.points.compute.min() > table.compute.max() / 10
    assert np.abs(found.relative_error).max() < 0.05
    np.testing.assert_allclose(
        found.decades_beyond, np.log10(found.points.compute / found.law.points.compute.max())
    )
    wrong = held_out(along_compute(KNOWN["floor"][1], count=36), "power", resamples=50)
    assert wrong is not None
    assert wrong.relative_error[-1] < -0.05, "a line goes on below the floor"


@pytest.mark.parametrize("column", ["corpus", "schedule", "metric", "recipe"])
def test_a_curve_is_of_one_corpus_schedule_metric_and_recipe(column):
    table = along_compute(KNOWN["power"][1])
    rows = [row.model_copy(update={column: f"x{at % 2}"}) for at, row in enumerate(table.rows)]
    with pytest.raises(ConfigError, match=r"no curve.*\b" + column + "=NAME"):
        fit(columns(rows), "power")


def test_too_few_points_and_missing_columns_are_told():
    table = along_compute(KNOWN["power"][1], count=3)
    with pytest.raises(DataError, match="3 points at different compute"):
        fit(table, "floor")
    with pytest.raises(DataError, match="say no parameters"):
        fit(table, "parametric")
    with pytest.raises(DataError, match="no point to fit"):
        columns([])


def test_a_table_of_points_is_read_and_its_mistakes_are_named(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("error,compute,parameters\n0.5,1e18,\n0.4,1e19,3e6\n")
    first, second = read_points(path)
    assert (first.run, first.error, second.parameters) == ("row 2", 0.5, 3e6)
    assert np.isnan(first.parameters)
    path.write_text("error,compute\n0.5,1e18\n-1,1e18\n")
    with pytest.raises(DataError, match="line 3: error"):
        read_points(path)
    path.write_text("error,kompute\n0.5,1e18\n")
    with pytest.raises(DataError, match="kompute"):
        read_points(path)
