"""The prototype loss: the invariants that any implementation of ProtoCLIP has to satisfy.

What must hold of ProtoCLIP's loss (arXiv 2206.10996), whatever the shards.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from tests.kernels.memory import largest_intermediate
from tests.losses.dense import (
    Problem,
    dense_info_nce,
    dense_prototype_losses,
    dense_targets,
    gradients,
    problem,
    random_rows,
)
from tests.losses.rank_cases import NUM_PROTOTYPES, TEMPERATURES, global_problem, results
from trainer.comm import Comm
from trainer.losses.constant_prototypes import (
    PrototypeTable,
    prototype_cross_entropy,
    prototype_losses,
    prototype_table,
    target_figures,
    temperature_of_entropy,
)
from trainer.losses.units import unit_rows

SOLO = Comm.solo()


def loss_of(case: Problem) -> torch.Tensor:
    return prototype_cross_entropy(case.features, case.labels, case.table, case.scale, SOLO)


def close(one, other, *, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(3, 30),
    st.integers(0, 2),
    st.sampled_from([-1.0, 0.0, 0.01, 0.1, 3.0]),
    st.integers(0, 99),
)
def test_equals_the_dense_soft_cross_entropy(
    batch: int, num_prototypes: int, num_empty: int, temperature: float, seed: int
) -> None:
    case = problem(
        batch=batch,
        num_prototypes=num_prototypes,
        num_empty=num_empty,
        num_unknown=batch // 3,
        temperature=temperature,
        seed=seed,
    )
    ours, dense = loss_of(case), dense_prototype_losses(case).mean()
    close(ours, dense)
    leaves = (case.features, case.scale)
    close(gradients(ours, *leaves), gradients(dense, *leaves), tolerance=1e-11)


@pytest.mark.heavy
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("num_prototypes", NUM_PROTOTYPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sharded_equals_dense(world_size: int, num_prototypes: int, temperature: float) -> None:
    """Uneven shards, a rank without rows, unknown labels unevenly spread, an empty prototype.

    The mean over ranks, and the gradients averaged over ranks, are those of one process.
    """
    whole = global_problem(num_prototypes, temperature)
    loss = dense_prototype_losses(whole).mean()
    features_gradient, scale_gradient = gradients(loss, whole.features, whole.scale)
    ranks = [cases[f"prototypes {num_prototypes} {temperature}"] for cases in results(world_size)]
    tensors = [{name: torch.from_numpy(value) for name, value in r.items()} for r in ranks]
    close(torch.stack([rank["loss"] for rank in tensors]).mean(), loss.detach())
    close(torch.stack([rank["grad_scale"] for rank in tensors]).mean(), scale_gradient)
    close(torch.cat([r["grad_features"] for r in tensors]) / world_size, features_gradient)
    close(torch.cat([rank["targets"] for rank in tensors]), whole.table.targets)
    for rank in tensors:
        close(rank["figures"], torch.from_numpy(dense_figures(whole).numpy()))


def dense_figures(case: Problem) -> torch.Tensor:
    """Own mass, entropy and misplaced peaks, from all rows of targets; k samples of cluster k."""
    every = case._replace(labels=torch.arange(len(case.prototypes)))
    targets = dense_targets(every)
    own = targets.diagonal()
    columns = torch.stack(
        [own, torch.special.entr(targets).sum(dim=1), (targets.amax(dim=1) > own).double()]
    )
    weight = torch.arange(len(own)) * case.valid
    return (columns[:, case.valid] * weight[case.valid]).sum(dim=1) / weight.sum()


def test_float32_is_close_to_float64() -> None:
    case = problem(batch=40, num_prototypes=200, temperature=0.05)
    exact = loss_of(case)
    rows = [value.float() for value in (case.prototypes, case.teacher)]
    features = case.features.detach().float().requires_grad_()
    single = case._replace(
        features=features, prototypes=rows[0], teacher=rows[1], scale=case.scale.detach().float()
    )
    loss = loss_of(single)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    expected = gradients(exact, case.features)[0]
    error = (gradients(loss, features)[0].double() - expected).abs().max()
    assert error <= 1e-4 * expected.abs().max()


def test_gradients_pass_finite_differences_and_reach_no_table() -> None:
    case = problem(batch=3, num_prototypes=5, num_empty=1, temperature=0.1)
    prototypes, teacher = case.prototypes.requires_grad_(), case.teacher.requires_grad_()
    table = prototype_table(
        prototypes, teacher, valid=case.valid, num_prototypes=5, temperature=0.1, comm=SOLO
    )

    def loss(features: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        return prototype_cross_entropy(features, case.labels, table, log_scale.exp(), SOLO)

    log_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (case.features, log_scale))
    trainable = table._replace(
        prototypes=table.prototypes.requires_grad_(), targets=table.targets.requires_grad_()
    )
    prototype_cross_entropy(case.features, case.labels, trainable, case.scale, SOLO).backward()
    for constant in (prototypes, teacher, trainable.prototypes, trainable.targets):
        assert constant.grad is None


def test_the_gradient_is_the_published_formula() -> None:
    """scale * (sum_j p_ij P_j - T[y_i]), and its product with f for the logarithm of the scale."""
    case = problem(temperature=0.1)
    scale, table = case.scale.detach(), case.table
    probabilities = (scale * case.features.detach() @ case.prototypes.T).softmax(dim=1)
    expected = scale * (probabilities @ case.prototypes - table.targets[case.labels])
    expected = expected / len(case.labels)
    of_features, of_scale = gradients(loss_of(case), case.features, case.scale)
    close(of_features, expected)
    close(scale * of_scale, (case.features.detach() * expected).sum())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_renaming_clusters_or_reordering_samples_changes_nothing(temperature: float) -> None:
    case = problem(num_unknown=2, num_empty=2, temperature=temperature)
    draw = torch.Generator().manual_seed(8)
    old_of_new = torch.randperm(len(case.prototypes), generator=draw)
    new_of_old = old_of_new.argsort()
    renamed = case._replace(
        prototypes=case.prototypes[old_of_new],
        teacher=case.teacher[old_of_new],
        valid=case.valid[old_of_new],
        labels=torch.where(case.labels >= 0, new_of_old[case.labels], -1),
    )
    close(loss_of(renamed), loss_of(case))
    close(gradients(loss_of(renamed), case.features), gradients(loss_of(case), case.features))

    order = torch.randperm(len(case.labels), generator=draw)
    losses, known = prototype_losses(case.features, case.labels, case.table, case.scale, SOLO)
    shuffled, still_known = prototype_losses(
        case.features[order], case.labels[order], case.table, case.scale, SOLO
    )
    close(shuffled, losses[order])
    assert torch.equal(still_known, known[order])


def test_cold_soft_targets_are_hard_where_the_own_product_is_highest() -> None:
    unit = problem(temperature=1e-4)
    close(loss_of(unit), loss_of(unit._replace(temperature=-1.0)))


def test_cold_soft_targets_are_not_hard_beside_a_longer_teacher_row() -> None:
    """Row 1 is row 0, longer: by inner product sample 0 belongs to cluster 1."""
    case = problem(num_prototypes=4, temperature=1e-4)
    teacher = torch.eye(4, dtype=torch.float64) * 0.5
    teacher[1] = 1.8 * teacher[0]
    case = case._replace(teacher=teacher, labels=torch.zeros_like(case.labels))
    hard = case._replace(temperature=-1.0)
    close(loss_of(case), loss_of(hard._replace(labels=torch.ones_like(case.labels))))
    assert abs(loss_of(case) - loss_of(hard)) > 0.1
    figures = figures_of(case, counts=torch.tensor([3, 1, 0, 0]))
    assert figures.off_peak == pytest.approx(0.75)
    assert figures.own_mass == pytest.approx(0.25)


def test_hot_soft_targets_are_uniform() -> None:
    case = problem(temperature=1e12)
    logits = case.scale * case.features @ case.prototypes.T
    expected = (logits.logsumexp(dim=1) - logits.mean(dim=1)).mean()
    close(loss_of(case), expected, tolerance=1e-10)


@pytest.mark.parametrize(("count", "temperature"), [(20_000, -1.0), (2_000, 0.05)])
def test_an_all_zero_table_gives_log_k_and_no_gradient(count: int, temperature: float) -> None:
    table = prototype_table(
        torch.zeros(count, 4),
        torch.zeros(count, 2),
        valid=torch.ones(count, dtype=torch.bool),
        num_prototypes=count,
        temperature=temperature,
        comm=SOLO,
    )
    features = torch.nn.functional.normalize(torch.randn(5, 4), dim=1).requires_grad_()
    labels = torch.tensor([0, 7, count - 1, 3, 4])
    loss = prototype_cross_entropy(features, labels, table, torch.tensor(50.0), SOLO)
    assert loss.item() == pytest.approx(math.log(count), rel=1e-6)
    assert gradients(loss, features)[0].abs().max() == 0.0


def test_the_other_modality_as_prototypes_is_info_nce() -> None:
    draw = torch.Generator().manual_seed(3)
    image, text = random_rows(9, 5, draw).requires_grad_(), random_rows(9, 5, draw)
    text.requires_grad_()
    scale = torch.tensor(12.0, dtype=torch.float64)

    def one_sided(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        valid = torch.ones(9, dtype=torch.bool)
        table = PrototypeTable(keys, keys, valid, num_prototypes=9)
        return prototype_cross_entropy(queries, torch.arange(9), table, scale, SOLO)

    expected = cross_entropy(scale * image @ text.detach().T, torch.arange(9))
    loss = one_sided(image, text)
    close(loss, expected)
    close(gradients(loss, image), gradients(expected, image))
    both = (loss + one_sided(text, image)) / 2
    close(both, dense_info_nce(image, text, scale))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.01, 0.05, 0.5]), st.integers(0, 99))
def test_the_loss_exceeds_the_target_entropy_by_the_divergence(
    temperature: float, seed: int
) -> None:
    case = problem(temperature=temperature, seed=seed)
    counts = case.labels.bincount(minlength=len(case.prototypes))
    gap = loss_of(case) - figures_of(case, counts=counts).entropy
    targets = dense_targets(case)
    log_probabilities = (case.scale * case.features @ case.prototypes.T).log_softmax(dim=1)
    divergence = (torch.special.xlogy(targets, targets) - targets * log_probabilities).sum(dim=1)
    close(gap, divergence.mean(), tolerance=1e-11)
    assert gap >= -1e-12


def test_no_divergence_where_the_student_says_what_the_teacher_says() -> None:
    case = problem(batch=13, dim=4, temperature=1 / 14.0)
    case = case._replace(prototypes=case.teacher, features=case.teacher, labels=torch.arange(13))
    entropy = figures_of(case, counts=torch.ones(13, dtype=torch.int64)).entropy
    close(loss_of(case).detach(), entropy)


def figures_of(case: Problem, *, counts: torch.Tensor):
    return target_figures(
        case.teacher,
        counts=counts,
        valid=case.valid,
        num_prototypes=len(case.prototypes),
        temperature=case.temperature,
        comm=SOLO,
    )


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 2.2), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 50.0]))
def test_the_temperature_of_an_entropy_gives_it_in_the_plain_form(
    entropy: float, seed: int, length: float
) -> None:
    """Entropy of softmax(Q Q^T / tau) row by row, for teachers of any length; log 10 is 2.3."""
    case = problem(num_empty=3, seed=seed)
    teacher = case.teacher * length
    counts = torch.arange(13) * case.valid
    found = temperature_of_entropy(
        teacher,
        counts=counts,
        valid=case.valid,
        num_prototypes=13,
        entropy=entropy,
        comm=SOLO,
    )
    rows = teacher[case.valid]
    targets = (rows @ rows.T / found).softmax(dim=1)
    each = -torch.special.xlogy(targets, targets).sum(dim=1)
    weights = counts[case.valid] / counts.sum()
    assert float((each * weights).sum()) == pytest.approx(entropy, abs=1e-4)


def test_an_entropy_that_no_temperature_gives_ends_at_the_hottest() -> None:
    case = problem()
    rows = {"counts": torch.ones(13, dtype=torch.int64), "valid": case.valid, "num_prototypes": 13}
    found = temperature_of_entropy(case.teacher, **rows, entropy=9.0, comm=SOLO)
    assert found > 500 * float(case.teacher.square().sum(dim=1).max())


def test_hard_targets_have_their_whole_mass_on_their_own_cluster() -> None:
    case = problem(temperature=-1.0)
    figures = figures_of(case, counts=torch.ones(13, dtype=torch.int64))
    assert [value.item() for value in figures] == [1.0, 0.0, 0.0]


@pytest.mark.heavy
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_no_known_label_gives_zero_and_no_nan(world_size: int) -> None:
    for cases in results(world_size):
        case = cases["nothing known"]
        assert case["loss"] == 0.0
        assert abs(case["grad_features"]).max() == 0.0
        assert case["grad_scale"] == 0.0


def test_no_valid_prototype_gives_zero_and_no_nan() -> None:
    case = problem(num_empty=2)
    table = case.table._replace(valid=torch.zeros(13, dtype=torch.bool))
    loss = prototype_cross_entropy(case.features, case.labels, table, case.scale, SOLO)
    assert loss.item() == 0.0
    for gradient in gradients(loss, case.features, case.scale):
        assert gradient.abs().max() == 0.0


def test_a_label_of_an_empty_prototype_is_unknown() -> None:
    case = problem(num_empty=3, num_unknown=2)
    expected = loss_of(case)
    into_an_empty_one = case._replace(labels=torch.where(case.labels < 0, 1, case.labels))
    close(loss_of(into_an_empty_one), expected)


def test_a_label_past_the_table_shows() -> None:
    """Value and gradient, so that the step is refused like any other that is not finite."""
    case = problem()
    loss = loss_of(case._replace(labels=case.labels.clone().fill_(13)))
    assert loss.isnan()
    assert gradients(loss, case.features)[0].isnan().all()


def test_empty_rows_as_zero_logits_add_a_known_amount() -> None:
    """log(1 + E exp(-lse)) per sample, for E empty rows; hard targets are the same either way."""
    case = problem(num_empty=4, temperature=-1.0)
    kept = case._replace(valid=torch.ones(13, dtype=torch.bool))
    labels, features, scale = case.labels, case.features, case.scale
    masked, _ = prototype_losses(features, labels, case.table, scale, SOLO)
    zeros, _ = prototype_losses(features, labels, kept.table, scale, SOLO)
    masked_lse = (scale * features @ case.prototypes[4:].T).logsumexp(dim=1)
    close(zeros - masked, torch.log1p(4 * torch.exp(-masked_lse)))


def test_rotating_a_space_changes_nothing() -> None:
    case = problem(temperature=0.05, num_empty=1)
    draw = torch.Generator().manual_seed(4)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64))
    student = case._replace(
        features=case.features @ rotation, prototypes=case.prototypes @ rotation
    )
    close(loss_of(student), loss_of(case))
    close(gradients(loss_of(student), case.features), gradients(loss_of(case), case.features))

    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=torch.float64))
    teacher = case._replace(teacher=case.teacher @ rotation)
    close(teacher.table.targets, case.table.targets)


@pytest.mark.heavy
def test_a_million_prototypes_at_scale_100_are_finite() -> None:
    """Float32, and no tensor of samples x prototypes in either pass."""
    angles = torch.linspace(0, torch.pi, 1_000_000)
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    valid = torch.ones(1_000_000, dtype=torch.bool)
    table = PrototypeTable(rows, rows, valid, num_prototypes=1_000_000)
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]).repeat(4, 1).requires_grad_()
    labels = torch.arange(0, 1_000_000, 90_000)
    scale = torch.tensor(100.0, requires_grad=True)
    losses = []

    def both_passes() -> None:
        losses.append(prototype_cross_entropy(features, labels, table, scale, SOLO))
        losses[0].backward()

    assert largest_intermediate(both_passes) == 2_000_000
    logits = 100 * features.detach().double() @ rows.double().T
    torch.testing.assert_close(losses[0].double(), cross_entropy(logits, labels), rtol=1e-6, atol=0)
    assert features.grad.isfinite().all()
    assert scale.grad.isfinite()


def test_targets_are_made_without_a_matrix_of_prototypes_by_prototypes() -> None:
    case = problem(num_prototypes=2500, dim=3, teacher_dim=2, temperature=0.1)
    assert largest_intermediate(lambda: case.table) == 512 * 1024


def test_unit_rows_keep_directions_and_zeros() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.01, 0.0]]))
    close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]), tolerance=1e-7)
