"""The probe against scikit-learn and against a plain loop."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.evals.rank_cases import setting
from tests.evals.test_sets import png_of, random_pictures, write_set
from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.evals import run_eval
from trainer.evals.linear_probe import PENALTIES, choose_penalty, predict
from trainer.evals.logistic import fit, fitted, with_ones
from trainer.evals.reference_probe import reference_probe
from trainer.evals.splits import Splits

SOLO = Comm.solo()


def clouds(count: int, *, dim: int, classes: int, seed: int, noise: float = 1.0) -> tuple:
    """Unit rows around one centre per class, in float64."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7)).double()
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    rows = centres[labels] + noise * torch.randn(count, dim, generator=draw).double()
    return F.normalize(rows, dim=1), labels


def scikit_learns(weight: float, **options: float) -> Any:
    """Its logistic regression, which takes a second to import."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=weight, **options)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3, 1e-4])
def test_weights_are_those_of_scikit_learn(penalty: float) -> None:
    rows, labels = clouds(150, dim=6, classes=4, seed=0)
    weights = fit(
        rows,
        labels,
        num_classes=4,
        penalty=penalty,
        comm=SOLO,
        max_iterations=1000,
        tolerance=1e-8,
    )
    reference = scikit_learns(1 / (len(rows) * penalty), tol=1e-10, max_iter=5000)
    reference.fit(rows.numpy(), labels.numpy())
    ours, bias = weights[:, :-1].numpy(), weights[:, -1].numpy()
    np.testing.assert_allclose(ours, reference.coef_, atol=2e-5 * np.abs(ours).max())
    shift = bias - reference.intercept_  # a common shift of all biases changes nothing
    np.testing.assert_allclose(shift, shift.mean(), atol=1e-4)
    fresh, _ = clouds(400, dim=6, classes=4, seed=1)
    assert predict(weights, fresh)[:, 0].tolist() == reference.predict(fresh.numpy()).tolist()


def test_gradient_vanishes_in_small_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evals.logistic.ROW_BLOCK", 37)
    rows, labels = clouds(150, dim=6, classes=4, seed=0)
    weights = fit(
        rows, labels, num_classes=4, penalty=1e-2, comm=SOLO, max_iterations=500, tolerance=1e-9
    ).requires_grad_()
    loss = F.cross_entropy(with_ones(rows) @ weights.T, labels)
    (gradient,) = torch.autograd.grad(loss + 0.5e-2 * weights[:, :-1].square().sum(), weights)
    assert gradient.abs().max() < 2e-9


def weak_directions(count: int, *, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as of a trained tower: the classes differ along directions of little variance."""
    draw = np.random.default_rng(0)
    labels = draw.integers(classes, size=count)
    centres = 0.05 * draw.normal(size=(classes, dim))
    rows = (centres[labels] + 0.35 * draw.normal(size=(count, dim))) * np.logspace(0, -2.5, dim)
    rows = rows / np.sqrt((rows**2).sum(1).mean())
    return torch.from_numpy(rows), torch.from_numpy(labels)


@pytest.mark.heavy
@pytest.mark.parametrize("penalty", [1e-4, 1e-6])
def test_converges_where_few_directions_are_strong(penalty: float) -> None:
    """In a tenth of the iterations that scikit-learn takes, to its objective."""
    rows, labels = weak_directions(500, dim=96, classes=8)
    reference = scikit_learns(1 / (len(rows) * penalty), tol=1e-8, max_iter=20000)
    reference.fit(rows.numpy(), labels.numpy())
    iterations = int(reference.n_iter_[0])
    found = fitted(
        rows,
        labels,
        num_classes=8,
        penalty=penalty,
        comm=SOLO,
        max_iterations=iterations // 4,
    )
    assert found.converged
    theirs = torch.from_numpy(np.column_stack([reference.coef_, reference.intercept_]))
    values = [
        float(F.cross_entropy(with_ones(rows) @ weights.T, labels))
        + penalty / 2 * float(weights[:, :-1].square().sum())
        for weights in (found.weights, theirs)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_an_unfinished_fit_says_so() -> None:
    rows, labels = weak_directions(500, dim=96, classes=8)
    options = {"num_classes": 8, "penalty": 1e-6, "comm": SOLO, "max_iterations": 3}
    found = fitted(rows, labels, **options)
    assert not found.converged
    weights = found.weights.clone().requires_grad_()
    loss = F.cross_entropy(with_ones(rows) @ weights.T, labels)
    (gradient,) = torch.autograd.grad(loss + 0.5e-6 * weights[:, :-1].square().sum(), weights)
    assert found.steepest == pytest.approx(float(gradient.abs().max()), rel=1e-9)
    with pytest.warns(UserWarning, match="has not converged after 3 iterations"):
        fit(rows, labels, **options)


@pytest.mark.heavy
def test_the_evaluation_reports_an_unfinished_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures = random_pictures(40, seed=0)
    specs = [
        write_set(
            tmp_path / f"{name}.tar",
            [(png_of(p), {"concept": str(i % 4)}) for i, p in enumerate(pictures[part])],
        )
        for name, part in (("train", slice(0, 24)), ("test", slice(24, 40)))
    ]
    encode, context = setting(SOLO, specs[0])
    config = EvalConfig(name="linear_probe", label="p", data=specs[1], train=specs[0])
    assert "unconverged" not in run_eval(config, encode, context)
    hurried = partial(fitted, max_iterations=1)
    monkeypatch.setattr("trainer.evals.linear_probe.fitted", hurried)
    assert run_eval(config, encode, context)["unconverged"] > 1e-6


def splits_of(rows: torch.Tensor, labels: torch.Tensor, classes: int) -> Splits:
    return Splits(
        train=rows.float(),
        train_labels=labels,
        train_ids=torch.arange(len(rows)) * 7919,
        test=rows[:0].float(),
        answers=labels[:0, None],
        num_learnt=classes,
        num_classes=classes,
    )


def test_noise_asks_for_a_stronger_penalty_than_clean_data() -> None:
    clean = splits_of(*clouds(400, dim=40, classes=4, seed=2, noise=0.3), 4)
    noisy_rows, noisy_labels = clouds(400, dim=40, classes=4, seed=2, noise=6.0)
    noisy = splits_of(noisy_rows, noisy_labels, 4)
    penalty, weights, unfinished = choose_penalty(noisy, seed=0, comm=SOLO)
    assert penalty in PENALTIES[:3]
    assert weights.shape == (4, 41)
    assert unfinished == 0.0
    # Without noise every penalty is perfect, and the strongest is kept.
    assert choose_penalty(clean, seed=0, comm=SOLO)[0] == PENALTIES[0]


def test_reference_protocol_reports_the_best_epoch() -> None:
    rows, labels = clouds(300, dim=8, classes=3, seed=3)
    fresh, answers = clouds(200, dim=8, classes=3, seed=4)
    options = {"num_classes": 3}
    figure = reference_probe(rows.float(), labels, fresh.float(), answers, **options)
    ours = fit(rows, labels, num_classes=3, penalty=1e-3, comm=SOLO)
    accuracy = 100 * (predict(ours, fresh)[:, 0] == answers).double().mean().item()
    assert abs(figure - accuracy) < 5
    fewer = reference_probe(rows.float(), labels, fresh.float(), answers, epochs=1, **options)
    assert figure >= fewer
