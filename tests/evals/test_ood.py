"""Out-of-distribution figures: the published code's arrays, scikit-learn with ties, and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.evals.rank_cases import setting
from tests.export.test_transformers_folder import moved_model
from tests.fixtures.emoji import write_shards
from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.errors import CheckpointError, DataError
from trainer.evals import run_eval
from trainer.evals.ood_scores import doubly_centred_score, fit_gaussian, separation
from trainer.evals.table import format_table
from trainer.export.native import load_trained

GOLDEN = Path(__file__).parents[1] / "golden" / "palm"
SOLO = Comm.solo()


def stored(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def test_tied_scores_are_measured_as_by_the_published_code():
    case = stored("ood_metrics_with_ties")
    found = separation(case["id_score"], case["ood_score"])
    assert found.fpr95 == pytest.approx(100 * float(case["fpr95"]), rel=1e-12)
    assert found.auroc == pytest.approx(100 * float(case["auroc"]), rel=1e-12)
    assert found.error == pytest.approx(100 * float(case["detection_error"]), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_areas_are_scikit_learns_whatever_the_ties(seed):
    from sklearn.metrics import average_precision_score, roc_auc_score

    draw = np.random.default_rng(seed)
    inside, outside = (draw.normal(m, 1, n).round(1) for m, n in ((0.7, 53), (0.0, 37)))
    found = separation(torch.from_numpy(inside), torch.from_numpy(outside))
    scores, truth = np.concatenate([inside, outside]), np.repeat([1, 0], [53, 37])
    assert found.auroc == pytest.approx(100 * roc_auc_score(truth, scores), rel=1e-12)
    assert found.aupr_in == pytest.approx(100 * average_precision_score(truth, scores), rel=1e-12)
    assert found.aupr_out == pytest.approx(
        100 * average_precision_score(1 - truth, -scores), rel=1e-12
    )


def test_separation_at_its_ends():
    high, low = torch.arange(10.0) + 20, torch.arange(7.0)
    assert separation(high, low) == (100.0, 0.0, 100.0, 100.0, 0.0)
    same = separation(torch.ones(6), torch.ones(4))
    assert same.auroc == 50.0
    with pytest.raises(DataError, match="0 of 0 outside samples have no score"):
        separation(high, low[:0])
    with pytest.raises(DataError, match="1 of 2 inside samples have no score"):
        separation(torch.tensor([1.0, float("nan")]), low)


def test_mahalanobis_scores_are_the_published_ones():
    case = stored("ssd_mahalanobis")
    train = case["train_features"]
    fit = fit_gaussian(train, None, num_classes=1, comm=SOLO)
    inside = {}
    for name, features in (("id", "id_test"), ("ood0", "ood0"), ("ood1", "ood1")):
        rows = case[f"{features}_features"]
        double = doubly_centred_score(train, rows)
        torch.testing.assert_close(double, case[f"{name}_score_fp64"], rtol=1e-9, atol=1e-9)
        single = case[f"{name}_score_single_centred_fp64"]
        torch.testing.assert_close(fit.score(rows), single, rtol=1e-8, atol=1e-8)
        inside[name] = double
    for name in ("ood0", "ood1"):
        found = separation(inside["id"], inside[name])
        assert found.fpr95 == pytest.approx(100 * float(case[f"{name}_fpr95"]))
        assert found.auroc == pytest.approx(100 * float(case[f"{name}_auroc"]))
        assert found.error == pytest.approx(100 * float(case[f"{name}_detection_error"]))


def test_class_means_with_one_shape_are_a_distance_from_the_nearest_mean():
    draw = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(40, 5, generator=draw, dtype=torch.float64), dim=1)
    labels = torch.arange(40) % 3
    fit = fit_gaussian(rows, labels, num_classes=4, comm=SOLO)
    means = torch.stack([rows[labels == c].mean(dim=0) for c in range(3)])
    shape = torch.linalg.inv(torch.cov((rows - means[labels]).T, correction=0))
    expected = [[-(r - m) @ shape @ (r - m) for m in means] for r in rows]
    torch.testing.assert_close(fit.score(rows), torch.tensor(expected).amax(dim=1))


def config(inside: str, test: str, outside: str, **more) -> EvalConfig:
    return EvalConfig(
        name="ood", label="ood", train=inside, data=test, outside={"far": outside},
        target="subgroup", **more,
    )  # fmt: skip


@pytest.mark.heavy
def test_every_score_is_measured_and_shown(tmp_path):
    spec = write_shards(tmp_path / "all", count=110, per_shard=20)
    inside, test, outside = (
        spec.replace("{000000..000005}", part)
        for part in ("{000000..000002}", "000003", "{000004..000005}")
    )
    model, context = setting(SOLO, inside)
    figures = run_eval(config(inside, test, outside), model, context)
    for score in ("msp", "energy", "ssd", "mahalanobis", "knn", "prototype"):
        assert 0 <= figures[f"{score}_auroc/far"] <= 100
    assert figures["inside/far"] == 20
    assert figures["outside/far"] == 30
    assert figures["shared/far"] == 0
    shown = format_table({"ood": figures})
    assert "knn auroc/far" in shown
    assert "seed 5" in shown
    assert "aupr" not in shown
    by_prompts = config(inside, test, outside, scores=("msp",), logits="zero_shot")
    assert 0 <= run_eval(by_prompts, model, context)["msp_auroc/far"] <= 100


def test_pictures_that_are_inside_too_are_no_outside_samples(tmp_path):
    """Under other names: 20 of 50 pictures are those of the test set, and then all of them."""
    spec = write_shards(tmp_path / "all", count=110, per_shard=20)
    again = write_shards(tmp_path / "again", count=110, per_shard=10)
    train = spec.replace("{000000..000005}", "{000000..000002}")
    test = spec.replace("{000000..000005}", "000003")
    model, context = setting(SOLO, train)
    some, none = (
        config(train, test, again.replace("{000000..000010}", part), scores=("ssd",))
        for part in ("{000006..000010}", "{000001..000003}")
    )
    figures = run_eval(some, model, context)
    assert (figures["shared/far"], figures["outside/far"]) == (20, 30)
    apart = config(train, test, spec.replace("{000000..000005}", "{000004..000005}"))
    expected = run_eval(apart.model_copy(update={"scores": ("ssd",)}), model, context)
    assert figures["ssd_auroc/far"] == pytest.approx(expected["ssd_auroc/far"], abs=1e-9)
    with pytest.raises(DataError, match=r"all 30 pictures .* none is outside"):
        run_eval(none, model, context)


def test_what_ood_needs_is_asked_for_and_what_others_do_not_read_is_refused():
    with pytest.raises(ValidationError, match="ood needs `outside`"):
        EvalConfig(name="ood", label="a", data="x.tar", train="y.tar")
    with pytest.raises(ValidationError, match="ood needs `train`"):
        EvalConfig(name="ood", label="a", data="x.tar", outside={"far": "z.tar"})
    with pytest.raises(ValidationError, match="outside is not read where name is knn"):
        EvalConfig(name="knn", label="a", data="x", train="y", outside={"far": "z.tar"})


def test_a_checkpoint_that_lacks_a_weight_is_not_scored():
    model = moved_model()
    weights = dict(model.state_dict())
    name = next(key for key in weights if key.startswith("image."))
    del weights[name]
    with pytest.raises(CheckpointError, match=f"1 tensors stand on one side only, as {name}"):
        load_trained(model, weights)
