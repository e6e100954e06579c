"""NMTune's terms and spectra: the published code's arrays, naive forms, and one rank or several."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tuning.rank_cases import rows_of
from trainer.comm import Comm
from trainer.errors import DataError
from trainer.tuning.head import Adapter, BatchNorm
from trainer.tuning.spectra import Moments, moments_of, spectrum
from trainer.tuning.terms import consistency, covariance, dominance

GOLDEN = Path(__file__).parents[1] / "golden" / "nmtune"
STEPS = sorted(path.name for path in GOLDEN.glob("step_*.npz"))
SPECTRA = sorted(path.name for path in GOLDEN.glob("spectrum_*.npz"))
SOLO = Comm.solo()


def stored(name):
    with np.load(GOLDEN / name, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


@pytest.mark.parametrize("name", STEPS)
def test_each_term_and_its_gradient_is_that_of_the_published_code(name):
    step = stored(name)
    half = int(step["batch_per_view"])
    weak, _ = step["features_weak_then_strong"].split(half)
    for term, value in {
        "mse": lambda z: consistency(z[half:], weak, mean="elements", comm=SOLO),
        "cov": lambda z: covariance(z, comm=SOLO),
        "svd": lambda z: dominance(z, top=5, comm=SOLO),
    }.items():
        tuned = step["mlp_features"].clone().requires_grad_()
        found = value(tuned)
        found.backward()
        assert found.item() == pytest.approx(float(step[f"term_{term}"]), rel=1e-9)
        torch.testing.assert_close(tuned.grad, step[f"grad_z_{term}"], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_has_the_gradients_of_the_published_code(name):
    step = stored(name)
    features, half = step["features_weak_then_strong"], int(step["batch_per_view"])
    adapter = Adapter(features.shape[1]).double()
    head = nn.Linear(features.shape[1], int(step["num_classes"])).double()
    places = {
        "mlp_fc1_weight": adapter.inner.weight,
        "mlp_fc1_bias": adapter.inner.bias,
        "bn_weight": adapter.norm.weight,
        "bn_bias": adapter.norm.bias,
        "mlp_fc2_weight": adapter.outer.weight,
        "mlp_fc2_bias": adapter.outer.bias,
        "residual_scale": adapter.scale,
        "head_weight": head.weight,
        "head_bias": head.bias,
    }
    with torch.no_grad():
        for key, parameter in places.items():
            parameter.copy_(step[key])
    tuned = adapter(features, SOLO)
    torch.testing.assert_close(tuned, step["mlp_features"], rtol=1e-9, atol=1e-10)
    loss = (
        F.cross_entropy(head(tuned), step["labels"].repeat(2))
        + step["weight_mse"]
        * consistency(tuned[half:], features[:half], mean="elements", comm=SOLO)
        + step["weight_cov"] * covariance(tuned, comm=SOLO)
        + step["weight_svd"] * dominance(tuned, top=5, comm=SOLO)
    )
    assert loss.item() == pytest.approx(float(step["loss_total"]), rel=1e-9)
    loss.backward()
    assert step["grad_mlp_fc1_bias"].abs().max() < 1e-12  # so it is not trained at all
    for key, parameter in places.items():
        if key == "mlp_fc1_bias":
            continue
        torch.testing.assert_close(parameter.grad, step[f"grad_{key}"], rtol=1e-7, atol=1e-9)


def test_batch_norm_is_torchs():
    rows, _ = rows_of(10, 6)
    ours, theirs = BatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for _ in range(3):
        torch.testing.assert_close(ours(rows, SOLO), theirs(rows))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(rows, SOLO), theirs(rows))


@pytest.mark.parametrize(("count", "dim"), [(5, 9), (40, 6)])
def test_terms_are_their_naive_forms(count, dim):
    tuned, frozen = rows_of(count, dim)
    matrix = torch.cov(tuned.T)
    off = matrix - matrix.diag().diag()
    assert float(covariance(tuned, comm=SOLO)) == pytest.approx(float(off.square().sum() / dim))
    rows = consistency(tuned, frozen, mean="rows", comm=SOLO)
    elements = consistency(tuned, frozen, mean="elements", comm=SOLO)
    assert float(rows) == pytest.approx(dim * float(elements))
    cosines = F.cosine_similarity(tuned, frozen)
    assert float(rows) == pytest.approx(float((2 - 2 * cosines).mean()))


def test_invariances_of_covariance_and_dominance():
    tuned, _ = rows_of(20, 6)
    turn = torch.linalg.qr(rows_of(6, 6)[0]).Q
    cov = float(covariance(tuned, comm=SOLO))
    assert float(covariance(tuned[torch.randperm(20)] + 3.0, comm=SOLO)) == pytest.approx(cov)
    assert float(covariance(2 * tuned, comm=SOLO)) == pytest.approx(16 * cov)
    assert float(covariance(torch.eye(2).double().repeat(3, 2) * 0, comm=SOLO)) == 0
    low = float(dominance(tuned, top=1, comm=SOLO))
    assert float(dominance(5 * tuned @ turn, top=1, comm=SOLO)) == pytest.approx(low)
    assert -1 <= low <= -1 / 6
    assert float(dominance(tuned[:, :1] * tuned[0], top=1, comm=SOLO)) == pytest.approx(-1)
    assert float(dominance(torch.eye(6).double(), top=1, comm=SOLO)) == pytest.approx(-1 / 6)


def test_gradients_stay_finite_for_equal_and_zero_rows():
    tuned = torch.cat([torch.ones(4, 5), torch.zeros(3, 5), torch.eye(5)]).double()
    tuned.requires_grad_()
    (dominance(tuned, top=5, comm=SOLO) + covariance(tuned, comm=SOLO)).backward()
    assert tuned.grad.isfinite().all()


@pytest.mark.parametrize("name", SPECTRA)
def test_streamed_spectra_are_the_stored_ones(name):
    case = stored(name)
    blocks = case["features"].split(4)
    dim = case["features"].shape[1]
    for stored_name, rows, centred in [
        ("raw", "raw", False),
        ("l2norm", "unit", False),
        ("l2norm_rowcentred", "unit_row_centred", False),
        ("column_centred", "raw", True),
    ]:
        found = spectrum(moments_of(blocks, dim=dim, rows=rows), column_centred=centred)
        expected = case[f"singular_values_{stored_name}"]
        largest = float(expected[0])
        torch.testing.assert_close(found.singular_values, expected, rtol=1e-6, atol=1e-6 * largest)
        assert found.sve == pytest.approx(float(case[f"sve_{stored_name}"]), abs=1e-6)
        assert found.lsvr == pytest.approx(float(case[f"lsvr_{stored_name}"]), abs=1e-6)
    code = spectrum(moments_of(blocks, dim=dim, rows="unit_row_centred")).singular_values
    published = case["singular_values_code_svd"].double()
    torch.testing.assert_close(code, published, rtol=1e-5, atol=1e-5)
    centred = moments_of(blocks, dim=dim, rows="unit_row_centred")
    found = spectrum(centred, column_centred=True).singular_values
    published = case["singular_values_code_pca"].double()
    torch.testing.assert_close(found, published, rtol=1e-5, atol=1e-5)


def test_entropy_and_dominance_at_their_ends():
    eye = torch.eye(5).double()
    flat = spectrum(moments_of([eye], dim=5, rows="raw"))
    assert flat.sve == pytest.approx(math.log(5))
    assert flat.lsvr == pytest.approx(math.log(5))
    one = spectrum(moments_of([torch.ones(7, 5)], dim=5, rows="raw"))
    assert one.sve == pytest.approx(0, abs=1e-6)
    assert one.lsvr == pytest.approx(0, abs=1e-6)


def test_a_large_mean_hides_the_spectrum_until_it_is_taken_off():
    rows = rows_of(200, 50)[0]
    shifted = moments_of([rows + 3.0], dim=50, rows="raw")
    assert spectrum(shifted).lsvr < 0.5 * spectrum(shifted, column_centred=True).lsvr
    plain = spectrum(moments_of([rows], dim=50, rows="raw"), column_centred=True)
    assert spectrum(shifted, column_centred=True).sve == pytest.approx(plain.sve, rel=1e-9)


def test_sums_add_in_any_order():
    rows = rows_of(30, 4)[0]
    parts = [moments_of([part], dim=4, rows="unit") for part in rows.split(7)]
    merged = Moments.none(4)
    for part in reversed(parts):
        merged = merged.merged(part)
    whole = moments_of([rows], dim=4, rows="unit")
    assert merged.num_rows == 30
    torch.testing.assert_close(merged.products, whole.products)


def test_zeros_have_no_spectrum():
    with pytest.raises(DataError, match="3 rows of features have no spectrum"):
        spectrum(moments_of([torch.zeros(3, 4)], dim=4, rows="raw"))
    with pytest.raises(DataError, match="0 rows"):
        spectrum(Moments.none(4))
