"""What the multi-label losses promise as formulas, in float64; numbers as in the literature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tests.losses.sharded_cases import active_rows
from trainer.comm import Comm
from trainer.errors import ConfigError, DataError
from trainer.losses.learned_prototypes import (
    ActiveRows,
    LogitOptions,
    Statistics,
    prototype_statistics,
)
from trainer.losses.margin import NO_MARGIN, Margin, coordinate_subset
from trainer.losses.multilabel import LossKind, MultilabelOptions, multilabel_loss
from trainer.losses.units import lean_unit_rows

SCALES = st.sampled_from([1.0, 10.0, 64.0])
SEEDS = st.integers(0, 999)


def drawn(seed: int, *, batch: int = 5, labels: int = 3, all_known: bool = False) -> Statistics:
    """Statistics of nothing in particular; every sample has a label, some have fewer."""
    draw = torch.Generator().manual_seed(seed)
    known = torch.rand(batch, labels, generator=draw) < (2 if all_known else 0.6)
    known[:, 0] = True
    cosines = torch.rand(batch, labels, generator=draw, dtype=torch.float64) * 1.8 - 0.9
    negatives = torch.randn(batch, generator=draw, dtype=torch.float64) * 10
    present = torch.ones(batch, dtype=torch.bool)
    return Statistics(negatives, cosines.where(known, 0.0), known, present)


def options_of(kind: LossKind, *, scale: float = 64.0, **said: Any) -> MultilabelOptions:
    return MultilabelOptions(kind, logits=LogitOptions(scale), **said)


def rows_of(statistics: Statistics, kind: str, scale: float, margin: Margin = NO_MARGIN) -> Tensor:
    return multilabel_loss(statistics, options_of(kind, scale=scale, margin=margin)).rows


def sums(statistics: Statistics, scale: float) -> tuple[Tensor, Tensor]:
    """sum_i e^-s_i and sum_j e^s_j."""
    pulls = (-scale * statistics.cosines).exp().where(statistics.is_positive, 0.0).sum(dim=1)
    return pulls, statistics.log_negatives.exp()


@settings(max_examples=60, deadline=None)
@given(SEEDS, SCALES)
def test_products_bounds_and_the_excess_of_one_label(seed: int, scale: float) -> None:
    statistics = drawn(seed)
    pulls, pushes = sums(statistics, scale)
    mlcd, mlc = rows_of(statistics, "mlcd", scale), rows_of(statistics, "mlc", scale)
    torch.testing.assert_close(mlcd, (1 + pulls + pushes + pulls * pushes).log())
    torch.testing.assert_close(mlc, (1 + pulls * pushes).log())
    assert (mlcd >= mlc).all()
    assert (mlc >= 0).all()
    one = drawn(seed, labels=1)
    pulls, pushes = sums(one, scale)
    excess = rows_of(one, "mlcd", scale) - rows_of(one, "slots", scale)
    expected = (pulls / (1 + pulls * pushes) + pushes / (1 + pulls * pushes)).log1p()
    torch.testing.assert_close(excess, expected, atol=1e-9, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(SEEDS, SCALES)
def test_pull_and_push_are_bounded_and_only_mlc_mixes_them(seed: int, scale: float) -> None:
    statistics = drawn(seed)
    for kind, mixes in (("mlcd", False), ("mlc", True)):
        cosines = statistics.cosines.clone().requires_grad_()
        negatives = statistics.log_negatives.clone().requires_grad_()
        own = statistics._replace(cosines=cosines, log_negatives=negatives)
        total = rows_of(own, kind, scale).sum()
        pull, push = torch.autograd.grad(total, (cosines, negatives), create_graph=True)
        assert (pull.sum(dim=1) / scale <= 0).all()
        assert (pull.sum(dim=1) / scale >= -1 - 1e-12).all()
        assert ((push >= 0) & (push <= 1 + 1e-12)).all()
        assert (pull[~statistics.is_positive] == 0).all()
        mixed = torch.autograd.grad(push.sum(), cosines, allow_unused=True)[0]
        if not mixes:
            assert mixed is None or (mixed == 0).all()
        elif scale == 1.0:
            assert (mixed != 0).any()


@settings(max_examples=60, deadline=None)
@given(SEEDS, SCALES, st.sampled_from(["mlcd", "mlc", "slots"]))
def test_order_and_padding_change_nothing_a_repeated_label_counts_again(
    seed: int, scale: float, kind: str
) -> None:
    statistics = drawn(seed)
    expected = rows_of(statistics, kind, scale)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    mixed = statistics._replace(
        cosines=statistics.cosines[:, order], is_positive=statistics.is_positive[:, order]
    )
    torch.testing.assert_close(rows_of(mixed, kind, scale), expected)
    wider = statistics._replace(
        cosines=torch.cat([statistics.cosines, statistics.cosines.new_full((5, 2), 0.3)], dim=1),
        is_positive=torch.cat([statistics.is_positive, torch.zeros(5, 2).bool()], dim=1),
    )
    torch.testing.assert_close(rows_of(wider, kind, scale), expected)
    twice = statistics._replace(
        cosines=statistics.cosines.repeat(1, 2), is_positive=statistics.is_positive.repeat(1, 2)
    )
    pulls, pushes = sums(statistics, scale)
    doubled = {
        "mlcd": (2 * pulls).log1p() + pushes.log1p(),
        "mlc": (2 * pulls * pushes).log1p(),
        "slots": expected,
    }[kind]
    torch.testing.assert_close(rows_of(twice, kind, scale), doubled)


@pytest.mark.parametrize("kind", ["mlcd", "mlc", "slots"])
def test_ends_are_finite_with_finite_gradients(kind: str) -> None:
    """No negative at all, no label, cosines of one; and what has nothing to say is left out."""
    cosines = torch.tensor([[1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]).double().requires_grad_()
    negatives = torch.tensor([50.0, -torch.inf, 3.0]).double().requires_grad_()
    known = torch.tensor([[True, True], [True, True], [False, False]])
    statistics = Statistics(negatives, cosines, known, torch.ones(3).bool())
    result = multilabel_loss(statistics, options_of(kind, scale=1e3, margin=Margin("angular", 0.3)))
    result.loss.backward()
    assert result.loss.isfinite()
    assert cosines.grad.isfinite().all()
    assert negatives.grad.isfinite().all()
    assert result.rows[1] == 0
    unlabelled = math.log1p(math.exp(3)) if kind == "mlcd" else 0.0
    assert result.rows[2].item() == pytest.approx(unlabelled)
    assert result.counted[2] == (kind == "mlcd")
    dropped = multilabel_loss(statistics, options_of(kind, scale=1e3, drop_unlabelled=True))
    assert dropped.counted.tolist() == [True, True, False]


def test_nobody_counts_is_a_loss_of_zero() -> None:
    statistics = drawn(0)._replace(present=torch.zeros(5).bool())
    assert multilabel_loss(statistics, options_of("mlcd")).loss == 0


def a_table(classes: int = 30, batch: int = 6, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, dim, generator=draw, dtype=torch.float64) * 3
    rows = torch.randn(classes, dim, generator=draw, dtype=torch.float64) * 0.01
    labels = torch.stack([torch.randperm(classes, generator=draw)[:3] for _ in range(batch)])
    return features, rows, labels


def whole(features: Tensor, rows: Tensor, labels: Tensor, **options) -> Statistics:
    active = active_rows(rows, first=0, negatives=torch.arange(len(rows)))
    return prototype_statistics(features, labels, active, Comm.solo(), LogitOptions(**options))


def test_one_label_is_the_cross_entropy_of_all_classes() -> None:
    features, rows, labels = a_table()
    one = labels[:, :1]
    statistics = whole(features, rows, one, scale=20.0)
    logits = 20.0 * (normalize(features) @ normalize(rows).T)
    logits[torch.arange(6), one[:, 0]] -= 20.0 * 0.3
    expected = cross_entropy(logits, one[:, 0])
    for kind in ("mlc", "slots", "pfc_ce"):
        torch.testing.assert_close(
            multilabel_loss(statistics, options_of(kind, scale=20.0)).loss, expected
        )


def test_one_label_of_mlcd_is_the_object_loss_of_rice() -> None:
    """arXiv 2507.20025: log(1 + e^-s) + log(1 + sum over sampled negatives of e^s), with a margin
    of 0.3 on the positive; written out, object by object, and its gradients."""
    features, rows, labels = (leaf.clone() for leaf in a_table())
    features.requires_grad_()
    sampled = torch.arange(0, len(rows), 2)
    total = torch.zeros((), dtype=torch.float64)
    for feature, label in zip(normalize(features), labels[:, 0], strict=True):
        cosines = normalize(rows) @ feature
        negatives = cosines[sampled[sampled != label]]
        total = total + (-20.0 * (cosines[label] - 0.3)).exp().log1p()
        total = total + (20.0 * negatives).exp().sum().log1p()
    others = torch.arange(1, len(rows), 2)
    ids = torch.cat([sampled, others])
    active = ActiveRows(rows[ids], ids, len(sampled))
    options = options_of("mlcd", scale=20.0, margin=Margin("cosine", 0.3))
    statistics = prototype_statistics(features, labels[:, :1], active, Comm.solo(), options.logits)
    ours = multilabel_loss(statistics, options).loss
    torch.testing.assert_close(ours, total / len(features))
    torch.testing.assert_close(
        torch.autograd.grad(ours, features), torch.autograd.grad(total / len(features), features)
    )


def test_a_single_label_loss_refuses_several() -> None:
    with pytest.raises(ConfigError, match="one label a sample, not 3"):
        multilabel_loss(drawn(0), options_of("pfc_ce"))


def test_equal_slots_are_one_slot() -> None:
    features, rows, labels = a_table()
    one = whole(features, rows, labels[:, :1], scale=20.0)
    eight = whole(features, rows, labels[:, :1].repeat(1, 8), scale=20.0)
    for ours, expected in zip(
        multilabel_loss(eight, options_of("slots", scale=20.0))[:2],
        multilabel_loss(one, options_of("slots", scale=20.0))[:2],
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["mlcd", "mlc", "slots"]), st.floats(0.01, 100.0))
def test_only_directions_matter(seed: int, kind: str, factor: float) -> None:
    features, rows, labels = a_table(seed=seed)
    values = []
    for size in (1.0, factor):
        leaves = (features * size).requires_grad_(), (rows * size).requires_grad_()
        statistics = whole(*leaves, labels, scale=30.0)
        loss = multilabel_loss(statistics, options_of(kind, scale=30.0)).loss
        gradients = torch.autograd.grad(loss, leaves)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            along = (gradient * leaf.detach()).sum(dim=1)
            torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-10, rtol=0)
        values.append((loss, *(gradient * size for gradient in gradients)))
    torch.testing.assert_close(values[0], values[1], rtol=1e-7, atol=1e-9)


def test_a_row_of_zeros_is_left_alone() -> None:
    rows = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    lean_unit_rows(rows).sum().backward()
    assert (rows.grad == 0).all()


@pytest.mark.parametrize("kind", ["angular", "straight_through"])
def test_angular_margins(kind: str) -> None:
    """cos(angle + m); its derivative is sin(angle + m) / sin(angle), or one by decree."""
    cosines = torch.tensor([-0.8, -0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    turned = Margin(kind, 0.3)(cosines)
    torch.testing.assert_close(turned, (cosines.arccos() + 0.3).cos())
    (gradient,) = torch.autograd.grad(turned.sum(), cosines)
    angle = cosines.detach().arccos()
    true = (angle + 0.3).sin() / angle.sin()
    torch.testing.assert_close(gradient, true if kind == "angular" else torch.ones(4).double())
    torch.testing.assert_close(Margin(kind, 0.0)(cosines), cosines)


def test_known_numbers_of_the_two_angular_gradients() -> None:
    cosine = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    for kind, slope in (("angular", 72.06), ("straight_through", 64.0)):
        value = 64 * Margin(kind, 0.3)(cosine)
        assert value.item() == pytest.approx(14.19, abs=0.01)
        assert torch.autograd.grad(value.sum(), cosine)[0].item() == pytest.approx(slope, abs=0.01)


def test_angular_margin_at_one_has_a_gradient() -> None:
    cosine = torch.tensor([1.0, -1.0], requires_grad=True)
    Margin("angular", 0.5)(cosine).sum().backward()
    assert cosine.grad.isfinite().all()


@pytest.mark.heavy
def test_negative_term_of_a_random_table() -> None:
    """log(1e5) plus half the variance of 64 cosines in 768 dimensions: 14.2."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(16, 768, generator=draw)
    rows = torch.randn(100_000, 768, generator=draw) * 0.01
    with torch.no_grad():
        statistics = whole(features, rows, torch.zeros(16, 1, dtype=torch.int64), scale=64.0)
    figures = multilabel_loss(statistics, options_of("mlcd")).figures
    assert figures["negative_term"].item() == pytest.approx(14.2, abs=0.1)


def test_a_label_past_the_table_is_refused() -> None:
    features, rows, labels = a_table()
    labels[2, 1] = len(rows)
    with pytest.raises(DataError, match="1 of 6 samples have a label"):
        whole(features, rows, labels, scale=64.0)


def test_weighted_samples_estimate_the_whole_sum() -> None:
    """-ln(rate) on each drawn row: over all halves of the rows the mean is the whole sum."""
    features, rows, labels = a_table(classes=8)
    nobody = torch.full_like(labels, -1)
    logits = LogitOptions(scale=5.0)
    full = whole(features, rows, nobody, scale=5.0).log_negatives.exp()
    halves = torch.combinations(torch.arange(8), 4)
    total = torch.zeros(6, dtype=torch.float64)
    for ids in halves:
        active = ActiveRows(rows[ids], ids, 4, torch.full((4,), math.log(2)).double())
        statistics = prototype_statistics(features, nobody, active, Comm.solo(), logits)
        total += statistics.log_negatives.exp() / len(halves)
    torch.testing.assert_close(total, full)


def test_coordinates() -> None:
    chosen = coordinate_subset(16, 5, 3, 7)
    assert len(chosen.unique()) == 5
    assert torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, coordinate_subset(16, 5, 3, 7))
    assert not torch.equal(chosen, coordinate_subset(16, 5, 3, 8))
    assert torch.equal(coordinate_subset(16, 16, 1), torch.arange(16))
    with pytest.raises(ConfigError, match="17 coordinates of 16"):
        coordinate_subset(16, 17, 1)


def test_equal_bits_again_and_micro_batches_are_one_batch() -> None:
    features, rows, labels = a_table(batch=8)

    def gradients(parts: int) -> tuple[Tensor, Tensor]:
        leaves = features.clone().requires_grad_(), rows.clone().requires_grad_()
        for some in torch.arange(8).chunk(parts):
            statistics = whole(leaves[0][some], leaves[1], labels[some], scale=30.0)
            (multilabel_loss(statistics, options_of("mlcd", scale=30.0)).loss / parts).backward()
        return leaves[0].grad, leaves[1].grad

    once = gradients(1)
    for one, other in zip(once, gradients(1), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(gradients(4), once)


def test_half_precision_on_the_way_costs_little() -> None:
    """Unit vectors in float16 move logits of scale 64 by thousandths."""
    features, rows, labels = (
        x.float() if x.is_floating_point() else x for x in a_table(dim=256, seed=4)
    )
    exact = whole(features, rows, labels, scale=64.0)
    rounded = whole(features, rows, labels, scale=64.0, gather_dtype=torch.float16)
    torch.testing.assert_close(rounded.log_negatives, exact.log_negatives, atol=1e-2, rtol=0)
    torch.testing.assert_close(rounded.cosines, exact.cosines, atol=2e-4, rtol=0)
