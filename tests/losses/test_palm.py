"""PALM's terms: the published program's numbers, the paper's formulas by loops, and over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from tests.losses.rank_cases import golden, golden_names
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.losses.palm import ClassPrototypes, PalmOptions, PalmResult, palm_terms

FILES = golden_names("palm/step_*.npz")


def class_major(table: Tensor, num_classes: int) -> Tensor:
    """The program's row p is of class p mod C; here classes are the first axis."""
    return table.unflatten(0, (-1, num_classes)).transpose(0, 1).contiguous()


def options_of(arrays: dict[str, Tensor]) -> PalmOptions:
    return PalmOptions(
        parity="code",
        momentum=float(arrays["proto_momentum"]),
        kept=int(arrays["topk"]),
        temperature=float(arrays["temperature"]),
    )


def share_of(rows: Tensor, comm: Comm, fill: float) -> Tensor:
    size = -(-len(rows) // comm.world_size)
    padded = torch.cat(
        [rows, rows.new_full((size * comm.world_size - len(rows), *rows.shape[1:]), fill)]
    )
    return padded[comm.rank * size : (comm.rank + 1) * size]


def terms_of(
    features: Tensor, labels: Tensor, table: Tensor, comm: Comm, options: PalmOptions
) -> tuple[PalmResult, Tensor, Tensor, Tensor]:
    """A rank's share of a step on the whole of everything; gradients of the mean of the ranks'
    losses, and the whole moved table."""
    rows = share_of(features, comm, 1.0).clone().requires_grad_()
    low, high = comm.row_range(len(table))
    prototypes = ClassPrototypes(table[low:high], low, len(table))
    result = palm_terms(rows, share_of(labels, comm, -1), prototypes, comm, options)
    gradients = []
    for term in (result.likelihood, result.contrast):
        (gradient,) = torch.autograd.grad(term / comm.world_size, rows, retain_graph=True)
        gradients.append(comm.all_gather(gradient)[: len(features)])
    return result, *gradients, comm.gather_rows(result.moved)


def published(comm: Comm) -> dict[str, float]:
    """The largest disagreement with the program's numbers, by file, step and array."""
    found = {}
    for file in FILES:
        arrays = {name: torch.as_tensor(value) for name, value in golden(file).items()}
        count = int(arrays["num_classes"])
        for step in range(int(arrays["num_steps"])):
            said = {n[3:]: v for n, v in arrays.items() if n.startswith(f"s{step}_")}
            features = said["features"].transpose(0, 1).flatten(0, 1)
            table = class_major(said["protos_before"], count)
            labels = said["labels"].repeat(2)
            result, mle, contrast, moved = terms_of(
                features, labels, table, comm, options_of(arrays)
            )
            for name, ours, theirs in (
                ("loss_mle", result.likelihood, said["loss_mle"]),
                ("loss_contrast", result.contrast, said["loss_contrast"]),
                ("protos_after", moved, class_major(said["protos_after"], count)),
                ("grad_mle", mle, said["grad_mle"].transpose(0, 1).flatten(0, 1)),
                ("grad_contrast", contrast, said["grad_contrast"].transpose(0, 1).flatten(0, 1)),
            ):
                scale = theirs.abs().max()
                found[f"{file} {step} {name}"] = float((ours - theirs).abs().max() / scale)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_program_s_losses_gradients_and_prototypes_on_any_number_of_ranks(world_size):
    """Four ranks leave one without a class of three or five; rows that fill up have no label."""
    for found in run_ranks(published, world_size, timeout_seconds=200):
        assert len(found) == 45
        limits = {"loss_mle": 1e-9, "protos_after": 1e-9, "grad_mle": 1e-8}
        for name, value in found.items():
            assert value < limits.get(name.split()[-1], 1e-7), name


def problem(num_classes: int = 3, per_class: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(14, 6, generator=generator, dtype=torch.float64)
    table = torch.randn(num_classes, per_class, 6, generator=generator, dtype=torch.float64)
    labels = torch.arange(14) % num_classes
    labels[5] = -1
    return normalize(features, dim=1), labels, normalize(table, dim=2)


PAPER = PalmOptions(momentum=0.6, kept=3, temperature=0.2, contrast_temperature=0.2)


def papers_assignment(features: Tensor, table: Tensor, labels: Tensor) -> dict[int, Tensor]:
    shares = {}
    for one in range(len(table)):
        matrix = torch.exp(features[labels == one] @ table[one].T / PAPER.epsilon)
        for _ in range(3):
            matrix = matrix / matrix.sum(dim=0)
            matrix = matrix / matrix.sum(dim=1, keepdim=True)
        shares[one] = matrix
    return shares


def papers_terms(features: Tensor, labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class by class and sample by sample."""
    before = papers_assignment(features.detach(), table, labels)
    masks, moved = {}, []
    for one, shares in before.items():
        masks[one] = shares >= shares.topk(PAPER.kept, dim=1).values[:, -1:]
        weights = shares * masks[one]
        weights = weights / weights.sum(dim=1, keepdim=True)
        drawn = weights.T @ features[labels == one]
        moved.append(normalize(0.6 * table[one] + 0.4 * drawn, dim=1))
    prototypes = torch.stack(moved)
    after = papers_assignment(features.detach(), prototypes.detach(), labels)
    terms = []
    for one, shares in after.items():
        weights = shares * masks[one]
        weights = weights / weights.sum(dim=1, keepdim=True)
        for row, weight in zip(features[labels == one], weights, strict=True):
            powers = torch.exp(prototypes.detach() @ row / 0.2)
            own = (weight * powers[one]).sum()
            others = sum(powers[k].mean() for k in range(len(table)) if k != one)
            terms.append(-torch.log(own / (own + others)))
    contrast = []
    for one in range(len(table)):
        for k, row in enumerate(moved[one]):
            powers = [torch.exp(each @ row / 0.2) for each in moved]
            own = powers[one].sum() - powers[one][k]
            others = sum(powers[j].sum() for j in range(len(table)) if j != one)
            contrast.append(-torch.log(own / others))
    return torch.stack(terms).mean(), torch.stack(contrast).mean(), prototypes.detach()


def papers(comm: Comm) -> list[Tensor]:
    result, mle, contrast, moved = terms_of(*problem(), comm, PAPER)
    return [result.likelihood.detach(), result.contrast.detach(), mle, contrast, moved]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_paper_s_formulas_by_loops_and_their_gradients(world_size):
    features, labels, table = problem()
    rows = features.clone().requires_grad_()
    mle, contrast, moved = papers_terms(rows, labels, table)
    gradients = [torch.autograd.grad(term, rows, retain_graph=True)[0] for term in (mle, contrast)]
    for found in run_ranks(papers, world_size):
        expected = [mle.detach(), contrast.detach(), *gradients, moved]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_one_prototype_a_class_is_cross_entropy_over_classes_in_both_forms():
    features, labels, table = problem(per_class=1)
    for parity in ("paper", "code"):
        options = PalmOptions(parity=parity, momentum=1.0, temperature=0.2)
        prototypes = ClassPrototypes(table, 0, len(table))
        result = palm_terms(features, labels, prototypes, Comm.solo(), options)
        logits = features @ table[:, 0].T / 0.2
        plain = cross_entropy(logits, labels, ignore_index=-1)
        torch.testing.assert_close(result.likelihood, plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.moved, table, rtol=0, atol=1e-15)


def test_a_class_without_samples_stays_and_momentum_zero_follows_the_features_alone():
    features, labels, table = problem()
    labels = labels.masked_fill(labels == 1, -1)
    for parity in ("paper", "code"):
        options = PalmOptions(parity=parity, momentum=0.0)
        prototypes = ClassPrototypes(table, 0, len(table))
        moved = palm_terms(features, labels, prototypes, Comm.solo(), options).moved
        assert torch.equal(moved[1], table[1])
        assert not torch.isclose(moved[[0, 2]], table[[0, 2]]).all(dim=2).any()
        assert torch.allclose(moved.norm(dim=2), torch.ones(()).double(), atol=1e-12)


def unlabelled(comm: Comm) -> tuple[float, Tensor, Tensor]:
    """Twelve views of six images against nine prototypes of no class."""
    draw = torch.Generator().manual_seed(5)
    features = normalize(torch.randn(12, 6, generator=draw, dtype=torch.float64), dim=1)
    table = normalize(torch.randn(1, 9, 6, generator=draw, dtype=torch.float64), dim=2)
    options = PalmOptions(parity="code", momentum=0.9, kept=3, exchanged_views=2)
    labels = torch.zeros(12, dtype=torch.int64)
    result, gradient, _, moved = terms_of(features, labels, table, comm, options)
    return float(result.likelihood.detach()), gradient, moved


def test_without_labels_a_view_is_compared_with_what_the_other_was_assigned():
    likelihood, gradient, moved = unlabelled(Comm.solo())
    draw = torch.Generator().manual_seed(5)
    features = normalize(torch.randn(12, 6, generator=draw, dtype=torch.float64), dim=1)
    before = normalize(torch.randn(1, 9, 6, generator=draw, dtype=torch.float64), dim=2)[0]

    def assigned(table: Tensor) -> Tensor:
        shares = torch.exp(features @ table.T / 0.05)
        for _ in range(3):
            shares = shares / shares.sum(0) / 9
            shares = shares / shares.sum(1, keepdim=True)
        return shares

    first = assigned(before)
    kept = torch.zeros_like(first).scatter_(1, first.topk(3).indices, 1.0)
    weights = assigned(moved[0]) * kept
    weights = weights / weights.sum(1, keepdim=True)
    features.requires_grad_()
    logits = features @ moved[0].T / 0.1
    terms = [
        logits[i].logsumexp(0) - (weights[i + 1 - 2 * (i % 2)] * logits[i]).sum() for i in range(12)
    ]
    torch.stack(terms).mean().backward()
    assert likelihood == pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-12)
    torch.testing.assert_close(gradient, features.grad, rtol=1e-10, atol=1e-12)
    for found in run_ranks(unlabelled, 2):
        assert found[0] == pytest.approx(likelihood, rel=1e-12)
        torch.testing.assert_close(found[1], gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[2], moved, rtol=1e-10, atol=1e-12)
