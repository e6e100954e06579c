"""Soft distillation against its dense form, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from tests.losses.dense import random_rows
from trainer.comm import Comm
from trainer.losses.contrastive import info_nce
from trainer.losses.distill import soft_distillation

SOLO = Comm.solo()


def rows(seed: int, count: int = 9, dim: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return random_rows(count, dim, draw), random_rows(count, dim, draw)


def test_equals_the_sums_written_out() -> None:
    (image, text), (seen, read) = rows(0), rows(1, dim=4)
    found = soft_distillation(image, text, torch.tensor(9.0).double(), seen, read, 30.0, SOLO)
    total = 0.0
    for query, keys, who, whom in ((image, text, seen, read), (text, image, read, seen)):
        for i in range(9):
            said = torch.stack([who[i] @ whom[j] * 30 for j in range(9)])
            own = torch.stack([query[i] @ keys[j] * 9 for j in range(9)])
            total -= float((said.exp() / said.exp().sum() * log_softmax(own, 0)).sum())
    assert float(found.loss) == pytest.approx(total / 18, rel=1e-12)


def test_the_divergence_is_what_torch_calls_kl_and_nothing_where_both_agree() -> None:
    (image, text), (seen, read) = rows(6), rows(7, dim=4)
    said = soft_distillation(image, text, torch.tensor(9.0).double(), seen, read, 30.0, SOLO)
    total = 0.0
    for query, keys, who, whom in ((image, text, seen, read), (text, image, read, seen)):
        target = log_softmax(30 * who @ whom.T, 1)
        own = log_softmax(9 * query @ keys.T, 1)
        total += float(kl_div(own, target, log_target=True, reduction="batchmean"))
    assert float(said.divergence) == pytest.approx(total / 2, rel=1e-11)
    scale = torch.tensor(30.0).double()
    same = soft_distillation(seen, read, scale, seen, read, 30.0, SOLO)
    assert abs(float(same.divergence)) < 1e-13
    assert float(same.loss) == pytest.approx(float(same.teacher_entropy))


def test_a_teacher_that_is_sure_of_every_pair_is_info_nce() -> None:
    image, text = rows(2)
    sure = torch.eye(9, dtype=torch.float64)
    scale = torch.tensor(14.0).double()
    found = soft_distillation(image, text, scale, sure, sure, 1e3, SOLO)
    assert float(found.loss) == pytest.approx(float(info_nce(image, text, scale, SOLO)), rel=1e-12)


def test_a_student_that_says_what_the_teacher_says_has_no_gradient() -> None:
    image, text = (side.requires_grad_() for side in rows(3))
    scale = torch.tensor(11.0).double().requires_grad_()
    value = soft_distillation(image, text, scale, image.detach(), text.detach(), 11.0, SOLO)
    value.loss.backward()
    for leaf in (image, text, scale):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e-12


def test_only_the_angles_of_a_teacher_count_and_both_ways_are_one_exchanged() -> None:
    """Turned and put into a space of more numbers, it says the same."""
    (image, text), (seen, read) = rows(8), rows(9, dim=4)
    scale = torch.tensor(12.0).double()
    found = soft_distillation(image, text, scale, seen, read, 20.0, SOLO)
    draw = torch.Generator().manual_seed(10)
    turn, _ = torch.linalg.qr(torch.randn(7, 4, dtype=torch.float64, generator=draw))
    turned = soft_distillation(image, text, scale, seen @ turn.T, read @ turn.T, 20.0, SOLO)
    exchanged = soft_distillation(text, image, scale, read, seen, 20.0, SOLO)
    for name in ("loss", "teacher_entropy", "divergence"):
        torch.testing.assert_close(getattr(turned, name), getattr(found, name))
        torch.testing.assert_close(getattr(exchanged, name), getattr(found, name))
    assert torch.equal(exchanged.image_to_text, found.text_to_image)


def test_the_teacher_is_a_constant() -> None:
    (image, text), (seen, read) = rows(4), rows(5)
    teacher = [side.requires_grad_() for side in (seen, read)]
    student = [side.requires_grad_() for side in (image, text)]
    soft_distillation(*student, torch.tensor(5.0).double(), *teacher, 20.0, SOLO).loss.backward()
    assert all(side.grad is None for side in teacher)
    assert all(side.grad is not None for side in student)
