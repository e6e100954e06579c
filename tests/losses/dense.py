"""The losses in their naive form: whole matrices, one process, textbook formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softmax, softplus

from trainer.comm import Comm
from trainer.losses.constant_prototypes import PrototypeTable, prototype_table


class Problem(NamedTuple):
    """One prototype term, whole."""

    features: Tensor
    labels: Tensor
    prototypes: Tensor
    teacher: Tensor
    valid: Tensor
    scale: Tensor
    temperature: float

    @property
    def table(self) -> PrototypeTable:
        return prototype_table(
            self.prototypes,
            self.teacher,
            valid=self.valid,
            num_prototypes=len(self.prototypes),
            temperature=self.temperature,
            comm=Comm.solo(),
        )


def problem(
    *,
    batch: int = 11,
    num_prototypes: int = 13,
    dim: int = 6,
    teacher_dim: int = 4,
    temperature: float = 0.1,
    seed: int = 0,
    num_empty: int = 0,
    num_unknown: int = 0,
) -> Problem:
    """Random, in float64; unit features, rows shorter than one, as centroids are."""
    draw = torch.Generator().manual_seed(seed)
    prototypes = random_rows(num_prototypes, dim, draw) * 0.8
    valid = torch.arange(num_prototypes) % num_prototypes >= num_empty
    labels = torch.randint(num_empty, num_prototypes, (batch,), generator=draw)
    labels[:num_unknown] = -1
    return Problem(
        random_rows(batch, dim, draw).requires_grad_(),
        labels[torch.randperm(batch, generator=draw)],
        prototypes * valid[:, None],
        random_rows(num_prototypes, teacher_dim, draw) * 0.9,
        valid,
        torch.tensor(14.0, dtype=torch.float64, requires_grad=True),
        temperature,
    )


def random_rows(count: int, dim: int, draw: torch.Generator) -> Tensor:
    rows = torch.randn(count, dim, generator=draw, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def dense_targets(case: Problem) -> Tensor:
    """[batch, prototypes] target probabilities; rows of unknown labels are meaningless."""
    labels = case.labels.clamp_min(0)
    if case.temperature <= 0:
        return one_hot(labels, len(case.prototypes)).to(case.features.dtype)
    similarity = case.teacher[labels] @ case.teacher.T / case.temperature
    return softmax(similarity.masked_fill(~case.valid, -torch.inf), dim=1)


def dense_prototype_losses(case: Problem) -> Tensor:
    """Soft cross-entropy of each sample, from the whole matrix of logits; unknown ones left out."""
    logits = (case.scale * case.features @ case.prototypes.T).masked_fill(~case.valid, -torch.inf)
    log_probabilities = log_softmax(logits, dim=1).masked_fill(~case.valid, 0.0)
    return -(dense_targets(case) * log_probabilities).sum(dim=1)[case.labels >= 0]


def dense_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    rows, columns = log_softmax(logits, dim=1), log_softmax(logits, dim=0)
    return -(rows.diagonal() + columns.diagonal()).mean() / 2


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return softplus(-signs * (scale * image @ text.T + bias)).sum() / len(image)


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)
